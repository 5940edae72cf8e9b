//! All of the report in order.

use fastvpn::error::{Error, Result};
use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::chart;
use super::figures::{BASELINE, Bar, Figure, Group, groups};
use super::findings::{Finding, findings, subject};
use super::palette::{self, Family};
use crate::results::{Results, Target};
use crate::table::{number, ratio_text};

const STYLE: &str = include_str!("style.css");

/// The whole page.
///
/// # Errors
/// When a chart cannot be drawn.
pub fn render(results: &Results) -> Result<String> {
    let groups = groups(results);
    let mut charts = Vec::new();
    for (number, group) in groups.iter().enumerate() {
        charts.push(section(number, group, &results.targets)?);
    }
    let night = palette::night_rules();
    let style = format!("{STYLE}\n@media (prefers-color-scheme: dark) {{\n{night}}}\n");
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                title { "fastvpn tunnel bench, " (results.started) }
                style { (PreEscaped(style)) }
            }
            body {
                header {
                    h1 { "fastvpn beside other tunnels" }
                    p.faint { "Version " (results.version) ", measured " (results.started) }
                    (headline(results))
                }
                main {
                    (contents(&groups))
                    (how_to_read(results))
                    @for chart in &charts { (chart) }
                    (left_out(results))
                    (tables(results, &groups))
                    (compared(results))
                    (facts("Machine", "machine", &results.machine))
                    (facts("Settings", "settings", &results.settings))
                }
            }
        }
    };
    Ok(page.into_string())
}

/// The chart of the first figure, on paper of its own.
///
/// # Errors
/// When it cannot be drawn, or nothing was measured.
pub fn render_picture(results: &Results) -> Result<String> {
    let groups = groups(results);
    let figures = groups.iter().flat_map(|group| &group.figures);
    let figure = figures.clone().find(|figure| !figure.bars.is_empty());
    let figure = figure.ok_or_else(|| Error::new("nothing was measured that could be drawn"))?;
    let chart = chart::render(figure, &results.targets, "chart")?;
    let paper = palette::hex(palette::PAPER.light);
    let night = palette::night_rules();
    let style = format!("@media (prefers-color-scheme: dark) {{\n{night}}}\n");
    let picture = html! {
        svg xmlns="http://www.w3.org/2000/svg" viewBox=(chart::view_box(figure)) {
            style { (PreEscaped(style)) }
            rect width="100%" height="100%" fill=(paper) {}
            (chart)
        }
    };
    Ok(picture.into_string())
}

fn headline(results: &Results) -> Markup {
    let subject = subject(results);
    let found = subject.map_or_else(Vec::new, |subject| findings(results, subject));
    let tile = |finding: &Finding| {
        html! {
            div.tile {
                dt { (finding.title) }
                dd {
                    span.value { (finding.value) } " " (finding.unit)
                    @for note in &finding.notes { span.note { (note) } }
                }
            }
        }
    };
    html! {
        @if let Some(subject) = subject.filter(|_| !found.is_empty()) {
            p { strong { (subject.title) } " (" (subject.detail) "), medians and their spread:" }
            dl.tiles { @for finding in &found { (tile(finding)) } }
        } @else {
            p { "There are no figures of fastvpn in this run." }
        }
    }
}

fn contents(groups: &[Group<'_>]) -> Markup {
    html! {
        nav aria-label="Contents" {
            @for (number, group) in groups.iter().enumerate() {
                a href={ "#group-" (number) } { (group.title) }
            }
            a href="#tables" { "All figures" }
            a href="#machine" { "Machine and settings" }
        }
    }
}

fn how_to_read(results: &Results) -> Markup {
    let has_baseline = results
        .cells
        .iter()
        .any(|cell| cell.target == BASELINE && cell.median().is_some());
    html! {
        p.faint {
            "A bar is the median over all rounds, a dot one sample, a line goes from the least \
             sample to the greatest. Targets stand in the order in which they were measured"
            @if has_baseline { "; the last column is the median's ratio to kernel VXLAN" }
            ". Tunnels without such a figure are not in the chart."
        }
    }
}

fn section(place: usize, group: &Group<'_>, targets: &[Target]) -> Result<Markup> {
    let mut panels = Vec::new();
    for (number, figure) in group.figures.iter().enumerate() {
        let id = format!("chart-{place}-{number}");
        let picture = match figure.bars.is_empty() {
            true => html! { p.faint { "Not measured." } },
            false => chart::render(figure, targets, &id)?,
        };
        panels.push(html! {
            figure {
                figcaption {
                    strong { (figure.row.title) } ", " (figure.row.unit)
                    span.faint { (chart::better(figure.row.better)) }
                }
                (picture)
            }
        });
    }
    Ok(html! {
        section id={ "group-" (place) } {
            h2 { (group.title) }
            div.panels { @for panel in &panels { (panel) } }
        }
    })
}

fn left_out(results: &Results) -> Markup {
    let missing: Vec<_> = results
        .targets
        .iter()
        .filter_map(|target| Some((target, target.missing.as_deref()?)))
        .collect();
    html! {
        @if !missing.is_empty() {
            section {
                h2 { "Left out" }
                ul {
                    @for (target, reason) in missing {
                        li { strong { (target.title) } ": " (reason) }
                    }
                }
            }
        }
    }
}

fn tables(results: &Results, groups: &[Group<'_>]) -> Markup {
    html! {
        section id="tables" {
            h2 { "All figures" }
            p.faint { "Median, least to greatest sample, and ratio to kernel VXLAN." }
            @for group in groups { (table(results, group)) }
        }
    }
}

fn table(results: &Results, group: &Group<'_>) -> Markup {
    let measured = results
        .targets
        .iter()
        .filter(|target| group.figures.iter().any(|f| f.bar(&target.key).is_some()));
    html! {
        // Wide ones scroll, also by keyboard.
        div.scroll tabindex="0" role="region" aria-label=(group.title) {
            table {
                caption { (group.title) }
                thead {
                    tr {
                        td {}
                        @for figure in &group.figures {
                            th scope="col" {
                                (figure.row.title) span.note { (figure.row.unit) }
                            }
                        }
                    }
                }
                tbody {
                    @for target in measured {
                        tr.own[is_own(target)] {
                            th scope="row" { (target.title) }
                            @for figure in &group.figures { (cell(figure, target)) }
                        }
                    }
                }
            }
        }
    }
}

fn cell(figure: &Figure<'_>, target: &Target) -> Markup {
    let note = |bar: &Bar<'_>| {
        let spread = format!("{}–{}", number(bar.min), number(bar.max));
        let spread = (bar.samples.len() > 1).then_some(spread);
        let ratio = bar.ratio.map(ratio_text);
        let parts: Vec<String> = spread.into_iter().chain(ratio).collect();
        parts.join(" · ")
    };
    html! {
        td {
            @match figure.bar(&target.key) {
                Some(bar) => { (number(bar.median)) span.note { (note(bar)) } },
                None => "–",
            }
        }
    }
}

/// How each target was run.
fn compared(results: &Results) -> Markup {
    let there = results.targets.iter().filter(|c| c.missing.is_none());
    let names_and_details = there.map(|target| (target, target.detail.as_str()));
    html! {
        section {
            h2 { "What was compared" }
            dl.facts {
                @for (target, detail) in names_and_details {
                    dt.own[is_own(target)] { (target.title) }
                    dd { (detail) }
                }
            }
        }
    }
}

fn facts(title: &str, id: &str, facts: &[(String, String)]) -> Markup {
    html! {
        @if !facts.is_empty() {
            section id=(id) {
                h2 { (title) }
                dl.facts { @for (name, value) in facts { dt { (name) } dd { (value) } } }
            }
        }
    }
}

fn is_own(target: &Target) -> bool {
    palette::family(target) == Family::Fastvpn
}
