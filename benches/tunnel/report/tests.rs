//! The report as a whole, of results good and bad.

use roxmltree::{Document, Node};

use super::chart::{Scale, scale};
use super::figures::{figure, groups};
use super::findings::{findings, subject};
use super::{page, palette, write_html};
use crate::results::{Better, Cell, Results, Row, Target};

const UNTOWARD: &str = "<b>&\"'</svg>";

fn target(key: &str, title: &str) -> Target {
    Target {
        key: key.into(),
        title: title.into(),
        detail: format!("how {key} was run"),
        missing: None,
    }
}

fn row(key: &str, group: &str, better: Better) -> Row {
    Row {
        key: key.into(),
        group: group.into(),
        title: format!("figure {key}"),
        unit: "unit".into(),
        better,
    }
}

fn cell(row: &str, target: &str, samples: &[f64]) -> Cell {
    Cell {
        row: row.into(),
        target: target.into(),
        samples: samples.to_vec(),
    }
}

fn results(targets: Vec<Target>, rows: Vec<Row>, cells: Vec<Cell>) -> Results {
    Results {
        started: "2026-01-02T03:04:05Z".into(),
        version: "0.1.0 (abcdef)".into(),
        machine: vec![("kernel".into(), "6.18".into())],
        settings: vec![("rounds".into(), "3".into())],
        targets,
        rows,
        cells,
    }
}

fn example() -> Results {
    let targets = vec![
        target("veth", "bare veth"),
        target("vxlan", "kernel VXLAN"),
        target("uring", "fastvpn, io_uring"),
        target("tinc", "tinc, no cipher"),
        target("openvpn", "OpenVPN, no cipher"),
    ];
    let throughput = "tcp-1/gbit_per_s";
    let cpu = "udp-64/cpu_ns_per_packet";
    let rows = vec![
        row(throughput, "TCP, 1 stream", Better::Higher),
        row("tcp-1/retransmits", "TCP, 1 stream", Better::Lower),
        row(cpu, "UDP, 64 bytes", Better::Lower),
    ];
    let cells = vec![
        cell(throughput, "veth", &[34.0, 33.0, 35.0]),
        cell(throughput, "vxlan", &[16.0, 15.0, 20.0]),
        cell(throughput, "uring", &[12.0, 9.0, 14.0]),
        cell(throughput, "tinc", &[0.25]),
        cell(throughput, "openvpn", &[0.75, 0.5]),
        cell("tcp-1/retransmits", "vxlan", &[1.0]),
        cell("tcp-1/retransmits", "uring", &[0.0, 0.0]),
        cell(cpu, "uring", &[2000.0, 2100.0, 2200.0]),
        cell(cpu, "tinc", &[21000.0]),
        cell(cpu, "openvpn", &[42000.0]),
    ];
    results(targets, rows, cells)
}

/// The charts of a page: each must be well-formed XML by itself.
fn charts(page: &str) -> Vec<&str> {
    let starts = page.match_indices("<svg role=\"img\"").map(|(at, _)| at);
    starts
        .map(|start| {
            let inner = start + page[start..].find("</svg>").unwrap() + "</svg>".len();
            let end = inner + page[inner..].find("</svg>").unwrap() + "</svg>".len();
            &page[start..end]
        })
        .collect()
}

fn parsed(chart: &str) -> Document<'_> {
    let document = Document::parse(chart).unwrap_or_else(|error| panic!("{error}: {chart}"));
    let root = document.root_element();
    assert!(root.has_tag_name(("http://www.w3.org/2000/svg", "svg")));
    for name in ["title", "desc"] {
        let child = root.children().find(|node| node.tag_name().name() == name);
        let child = child.unwrap_or_else(|| panic!("no {name}: {chart}"));
        let labels = root.attribute("aria-labelledby").unwrap();
        assert!(
            labels
                .split(' ')
                .any(|id| Some(id) == child.attribute("id"))
        );
        assert!(child.text().is_some_and(|text| !text.is_empty()));
    }
    for node in document.descendants() {
        for attribute in node.attributes() {
            check_numbers(attribute.name(), attribute.value());
        }
    }
    document
}

/// Numbers of a drawing are finite, and small enough to be on it.
fn check_numbers(name: &str, value: &str) {
    let names = [
        "x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "width", "height", "points",
    ];
    if !names.contains(&name) {
        return;
    }
    for number in value.split([' ', ',']).filter(|text| !text.is_empty()) {
        let parsed: f64 = number.parse().unwrap();
        assert!(parsed.abs() < 100_000.0, "{name}={value}");
    }
}

fn texts(document: &Document<'_>) -> Vec<String> {
    let texts = document
        .descendants()
        .filter(|node| node.tag_name().name() == "text");
    texts
        .filter_map(|node| Some(node.text()?.trim().to_string()))
        .collect()
}

fn count(document: &Document<'_>, what: impl Fn(&Node<'_, '_>) -> bool) -> usize {
    document.descendants().filter(what).count()
}

#[test]
fn a_chart_shows_medians_samples_and_ratios() {
    let results = example();
    let page = page::render(&results).unwrap();
    let charts = charts(&page);
    assert_eq!(charts.len(), 3);
    let chart = parsed(charts[0]);
    let texts = texts(&chart);
    for expected in [
        "kernel VXLAN",
        "fastvpn, io_uring",
        "34.0",
        "2.12×",
        "0.75×",
        "/VXLAN",
    ] {
        assert!(
            texts.iter().any(|text| text == expected),
            "{expected}: {texts:?}"
        );
    }
    assert!(
        texts.iter().any(|text| text == "unit, logarithmic"),
        "{texts:?}"
    );
    // A rim and a dot for each of 12 samples.
    assert_eq!(count(&chart, |node| node.tag_name().name() == "circle"), 24);
    // In the order measured, from top to bottom, each in its colour.
    let mut above = f64::NEG_INFINITY;
    for target in &results.targets {
        let color = palette::hex(palette::color(target, &results.targets).light);
        let bars: Vec<_> = chart
            .descendants()
            .filter(|node| node.tag_name().name() == "rect")
            .filter(|node| node.attribute("fill") == Some(&color))
            .collect();
        assert_eq!(bars.len(), 1, "{}", target.key);
        let y: f64 = bars[0].attribute("y").unwrap().parse().unwrap();
        assert!(y > above, "{}", target.key);
        above = y;
    }
}

#[test]
fn longer_bars_are_of_greater_medians() {
    let mut results = example();
    results.targets.truncate(3);
    let page = page::render(&results).unwrap();
    let chart = parsed(charts(&page)[0]);
    let width = |key: &str| -> f64 {
        let target = results.targets.iter().find(|c| c.key == key).unwrap();
        let color = palette::hex(palette::color(target, &results.targets).light);
        let mut nodes = chart.descendants();
        let bar = nodes.find(|node| {
            node.tag_name().name() == "rect" && node.attribute("fill") == Some(&color)
        });
        bar.unwrap().attribute("width").unwrap().parse().unwrap()
    };
    // Linear, from nothing: 34, 16 and 12.
    for (key, median) in [("vxlan", 16.0), ("uring", 12.0)] {
        let (share, expected) = (width(key) / width("veth"), median / 34.0);
        assert!((share - expected).abs() < 0.01, "{key}: {share} {expected}");
    }
}

#[test]
fn what_is_usually_none_has_no_ratio() {
    let page = page::render(&example()).unwrap();
    let texts = texts(&parsed(charts(&page)[1]));
    assert!(
        texts
            .iter()
            .all(|text| !text.contains('×') && text != "/VXLAN"),
        "{texts:?}"
    );
}

#[test]
fn findings_are_computed() {
    let mut results = example();
    results.rows[2].unit = "1000/s".into();
    let subject = subject(&results).unwrap();
    assert_eq!(subject.key, "uring");
    let findings = findings(&results, subject);
    let shown: Vec<_> = findings
        .iter()
        .map(|finding| {
            let value = format!("{} {}", finding.value, finding.unit);
            (value, finding.notes.join("; "))
        })
        .collect();
    let expected = [
        (
            "12.0 unit",
            "9.00 to 14.0; 0.75× kernel VXLAN; 19.2× OpenVPN, no cipher",
        ),
        ("2100 × 1000/s", "2000 to 2200; 0.10× tinc, no cipher"),
    ];
    assert_eq!(
        shown,
        expected.map(|(value, notes)| (value.to_string(), notes.to_string()))
    );
}

#[test]
fn another_way_of_fastvpn_is_the_subject_where_the_default_was_not_measured() {
    let mut results = example();
    for cell in &mut results.cells {
        if cell.target == "uring" {
            cell.target = "my-variant".into();
        }
    }
    results.targets.push(target("my-variant", "my-variant"));
    assert_eq!(subject(&results).unwrap().key, "my-variant");
    results.cells.retain(|cell| cell.target == "vxlan");
    assert!(subject(&results).is_none());
    let page = page::render(&results).unwrap();
    assert!(page.contains("no figures of fastvpn"));
}

#[test]
fn markup_in_texts_stays_text() {
    let mut results = example();
    results.version = UNTOWARD.into();
    results.started = UNTOWARD.into();
    results.machine[0] = (UNTOWARD.into(), UNTOWARD.into());
    results.settings[0] = (UNTOWARD.into(), UNTOWARD.into());
    for target in &mut results.targets {
        target.title = UNTOWARD.into();
        target.detail = UNTOWARD.into();
    }
    results.targets[3].missing = Some(UNTOWARD.into());
    for row in &mut results.rows {
        row.title = UNTOWARD.into();
        row.unit = UNTOWARD.into();
        row.group = UNTOWARD.into();
    }
    let page = page::render(&results).unwrap();
    assert!(!page.contains("<b>"), "{page}");
    assert!(page.contains("&lt;b&gt;&amp;"));
    let charts = charts(&page);
    assert_eq!(charts.len(), 3);
    for chart in charts {
        let chart = parsed(chart);
        assert!(texts(&chart).iter().any(|text| text == UNTOWARD));
    }
}

#[test]
fn cells_without_numbers_are_as_none() {
    let mut results = example();
    let odd = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, f64::MAX];
    results.cells[0].samples = vec![];
    results.cells[1].samples = odd.to_vec();
    results.cells[2].samples.extend(odd);
    let figure = figure(&results, &results.rows[0]);
    let keys: Vec<_> = figure
        .bars
        .iter()
        .map(|bar| bar.target.key.as_str())
        .collect();
    assert_eq!(keys, ["uring", "tinc", "openvpn"]);
    assert_eq!((figure.bars[0].median, figure.bars[0].max), (12.0, 14.0));
    // Without the baseline there is nothing to take ratios to.
    assert!(!figure.has_ratios());
    let page = page::render(&results).unwrap();
    for chart in charts(&page) {
        assert!(texts(&parsed(chart)).iter().all(|text| !is_odd(text)));
    }
    let visible = page.split_once("</style>").unwrap().1;
    let words = visible.split(|c: char| c.is_whitespace() || "<>\"–×".contains(c));
    assert!(words.clone().count() > 100);
    assert!(words.into_iter().all(|word| !is_odd(word)));
}

fn is_odd(text: &str) -> bool {
    ["NaN", "inf", "-inf"].contains(&text)
}

#[test]
fn a_row_that_nobody_has_is_said_to_be_unmeasured() {
    let mut results = example();
    results.cells.retain(|cell| !cell.row.starts_with("udp-64"));
    let page = page::render(&results).unwrap();
    assert_eq!(charts(&page).len(), 2);
    assert!(page.contains("Not measured."));
}

#[test]
fn nothing_and_one_target_are_enough() {
    page::render(&results(vec![], vec![], vec![])).unwrap();
    let mut one = example();
    one.targets.retain(|target| target.key == "uring");
    one.cells.retain(|cell| cell.target == "uring");
    let page = page::render(&one).unwrap();
    for chart in charts(&page) {
        parsed(chart);
    }
    assert!(!page.contains("/VXLAN"));
    // Nor is there a word of what was not left out.
    assert!(!page.contains("Left out"));
}

#[test]
fn what_was_left_out_is_named_with_the_reason() {
    let mut results = example();
    results.targets[4].missing = Some("openvpn is not installed".into());
    let page = page::render(&results).unwrap();
    assert!(page.contains("<strong>OpenVPN, no cipher</strong>: openvpn is not installed"));
}

#[test]
fn extremes_fit_the_drawing() {
    let extremes: [&[f64]; 7] = [
        &[0.0],
        &[-5.0, 5.0],
        &[-5.0],
        &[1e-300, 1e15],
        &[1e-12],
        &[1e15],
        &[f64::MIN_POSITIVE],
    ];
    for samples in extremes {
        for others in extremes {
            let mut results = example();
            results.cells = vec![
                cell("tcp-1/gbit_per_s", "vxlan", samples),
                cell("tcp-1/gbit_per_s", "uring", others),
            ];
            let page = page::render(&results).unwrap();
            for chart in charts(&page) {
                let texts = texts(&parsed(chart));
                assert!(texts.iter().all(|text| !is_odd(text)), "{texts:?}");
            }
        }
    }
}

#[test]
fn the_scale_is_logarithmic_from_two_decades_on() {
    let of = |medians: [f64; 2]| {
        let mut results = example();
        results.cells = vec![
            cell("tcp-1/gbit_per_s", "vxlan", &medians[..1]),
            cell("tcp-1/gbit_per_s", "uring", &medians[1..]),
        ];
        scale(&figure(&results, &results.rows[0]).bars)
    };
    let logarithmic = |medians, expected: f64| match of(medians) {
        Scale::Logarithmic(range) => {
            // The mark at its start is on it.
            assert!(range.start < expected && range.start > 0.999 * expected);
            assert!(range.end > medians[1]);
        }
        linear => panic!("{linear:?}"),
    };
    assert_eq!(of([1.0, 99.0]), Scale::Linear(0.0..99.0 * 1.04));
    logarithmic([5.0, 505.0], 1.0);
    // A bar of the least median has some length.
    logarithmic([1.0, 200.0], 0.1);
    assert_eq!(of([0.0, 200.0]), Scale::Linear(0.0..200.0 * 1.04));
    assert_eq!(of([0.0, 0.0]), Scale::Linear(0.0..1.0));
}

#[test]
fn groups_keep_the_order() {
    let results = example();
    let groups = groups(&results);
    let titles: Vec<_> = groups
        .iter()
        .map(|group| (group.title, group.figures.len()))
        .collect();
    assert_eq!(titles, [("TCP, 1 stream", 2), ("UDP, 64 bytes", 1)]);
}

#[test]
fn the_page_needs_nothing_from_elsewhere() {
    let page = page::render(&example()).unwrap();
    let elsewhere = page.replace("http://www.w3.org/2000/svg", "");
    for word in [
        "http:", "https:", "<script", "<link", "@import", "url(", "src=",
    ] {
        assert!(!elsewhere.contains(word), "{word}");
    }
}

#[test]
fn the_night_knows_every_colour_of_the_charts() {
    let page = page::render(&example()).unwrap();
    let rules = palette::night_rules();
    for chart in charts(&page) {
        for node in parsed(chart).descendants() {
            for name in ["fill", "stroke"] {
                let Some(color) = node.attribute(name).filter(|color| *color != "none") else {
                    continue;
                };
                let rule = format!("[{name}=\"{color}\"]");
                assert!(rules.contains(&rule), "{rule}: {:?}", node.tag_name());
            }
        }
    }
}

#[test]
fn a_picture_stands_by_itself() {
    let results = example();
    let picture = page::render_picture(&results).unwrap();
    let document = Document::parse(&picture).unwrap();
    let texts: Vec<_> = document
        .descendants()
        .filter_map(|node| node.text())
        .collect();
    for name in ["fastvpn, io_uring", "kernel VXLAN", "12.0"] {
        assert!(
            texts.iter().any(|text| text.trim() == name),
            "{name}: {texts:?}"
        );
    }
    let empty = page::render_picture(&results_of_nobody());
    assert!(
        empty
            .unwrap_err()
            .to_string()
            .contains("nothing was measured")
    );
}

fn results_of_nobody() -> Results {
    results(Vec::new(), Vec::new(), Vec::new())
}

#[test]
fn the_file_is_written_with_its_directory() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("new/report.html");
    write_html(&example(), &path).unwrap();
    let page = std::fs::read_to_string(&path).unwrap();
    assert!(page.starts_with("<!DOCTYPE html>") && page.ends_with("</html>"));
    let error = write_html(&example(), directory.path()).unwrap_err();
    assert!(error.to_string().contains("cannot write"), "{error}");
}
