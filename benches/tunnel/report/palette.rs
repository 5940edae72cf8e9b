//! A colour for each target, by day and by night.
//!
//! Charts are drawn in the colours of the day; by night the page's style sheet
//! turns each of them into its counterpart.

use plotters::style::RGBColor;

use crate::results::Target;

/// A colour by day and by night.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ink {
    /// On [`PAPER`] by day.
    pub light: RGBColor,
    /// On [`PAPER`] by night.
    pub dark: RGBColor,
}

const fn ink(light: u32, dark: u32) -> Ink {
    Ink {
        light: rgb(light),
        dark: rgb(dark),
    }
}

const fn rgb(value: u32) -> RGBColor {
    let [_, red, green, blue] = value.to_be_bytes();
    RGBColor(red, green, blue)
}

/// Behind everything.
pub const PAPER: Ink = ink(0xffffff, 0x14181f);
/// Text and samples.
pub const TEXT: Ink = ink(0x1a1f27, 0xe8ecf2);
/// Text that may be passed over: units, ticks.
pub const FAINT: Ink = ink(0x59626e, 0xa3adb9);
/// Lines of the grid.
pub const GRID: Ink = ink(0xe3e7ec, 0x2c333d);

/// fastvpn, in its several ways.
const FASTVPN: [Ink; 7] = [
    ink(0x1659d0, 0x5c9dff),
    ink(0x7440d6, 0xb294ff),
    ink(0x07808a, 0x39c2c4),
    ink(0xb8277f, 0xf27abd),
    ink(0x2e7d32, 0x6fcf74),
    ink(0xc2410b, 0xff9a5c),
    ink(0x7a6400, 0xd8bf4a),
];

/// What the kernel does by itself.
const KERNEL: [Ink; 2] = [ink(0x868f9b, 0x79838f), ink(0x4b535e, 0xb4bdc8)];

/// Other programs.
const OTHERS: [Ink; 7] = [
    ink(0x947d4f, 0xb59d6c),
    ink(0x7f8f63, 0x95a777),
    ink(0x9a7577, 0xbd9496),
    ink(0x6c8593, 0x87a2b1),
    ink(0x85769b, 0xa393bb),
    ink(0x5c9185, 0x78aea2),
    ink(0xa1785b, 0xc49a7d),
];

/// Targets of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// fastvpn, in its several ways.
    Fastvpn,
    /// What the kernel does by itself.
    Kernel,
    /// Other programs.
    Others,
}

/// What a target is. Whatever is not known is fastvpn: only that can be
/// given names of one's own.
pub fn family(target: &Target) -> Family {
    match target.key.as_str() {
        "veth" | "vxlan" => Family::Kernel,
        "one-packet" | "openvpn" | "fastd" | "tinc" | "wireguard-go" | "boringtun" | "gotatun" => {
            Family::Others
        }
        _ => Family::Fastvpn,
    }
}

/// The colour of one of the targets, the same wherever it is drawn.
pub fn color(target: &Target, all: &[Target]) -> Ink {
    let own = family(target);
    let place = all
        .iter()
        .filter(|other| family(other) == own)
        .position(|other| other.key == target.key)
        .unwrap_or(0);
    let inks: &[Ink] = match own {
        Family::Fastvpn => &FASTVPN,
        Family::Kernel => &KERNEL,
        Family::Others => &OTHERS,
    };
    inks[place % inks.len()]
}

fn all_inks() -> impl Iterator<Item = Ink> {
    [PAPER, TEXT, FAINT, GRID]
        .into_iter()
        .chain(FASTVPN)
        .chain(KERNEL)
        .chain(OTHERS)
}

/// A colour as the chart's backend writes it.
pub fn hex(color: RGBColor) -> String {
    format!("#{:02X}{:02X}{:02X}", color.0, color.1, color.2)
}

/// Style rules that turn the charts' colours into those of the night.
pub fn night_rules() -> String {
    all_inks()
        .map(|ink| {
            let (light, dark) = (hex(ink.light), hex(ink.dark));
            format!(
                "svg [fill=\"{light}\"]{{fill:{dark}}}svg [stroke=\"{light}\"]{{stroke:{dark}}}\n"
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Relative luminance, WCAG 2.
    fn luminance(color: RGBColor) -> f64 {
        let linear = |byte: u8| {
            let share = f64::from(byte) / 255.0;
            match share <= 0.04045 {
                true => share / 12.92,
                false => ((share + 0.055) / 1.055).powf(2.4),
            }
        };
        0.2126 * linear(color.0) + 0.7152 * linear(color.1) + 0.0722 * linear(color.2)
    }

    fn contrast(a: RGBColor, b: RGBColor) -> f64 {
        let (a, b) = (luminance(a), luminance(b));
        (a.max(b) + 0.05) / (a.min(b) + 0.05)
    }

    #[test]
    fn contrast_is_that_of_black_on_white() {
        let black_on_white = contrast(rgb(0), rgb(0xffffff));
        assert!((black_on_white - 21.0).abs() < 1e-9, "{black_on_white}");
    }

    #[test]
    fn everything_can_be_made_out() {
        // WCAG 2: 4.5 for text, 3 for what a picture is made of.
        let bars = FASTVPN.iter().chain(&KERNEL).chain(&OTHERS);
        let bars = bars.map(|bar| (*bar, 3.0));
        for (ink, least) in bars.chain([(TEXT, 4.5), (FAINT, 4.5)]) {
            for contrast in [
                contrast(ink.light, PAPER.light),
                contrast(ink.dark, PAPER.dark),
            ] {
                assert!(contrast >= least, "{ink:?}: {contrast}");
            }
        }
    }

    #[test]
    fn no_two_inks_are_one_by_day() {
        // Or the style sheet could not tell them apart.
        let mut colors: Vec<_> = all_inks().map(|ink| hex(ink.light)).collect();
        let count = colors.len();
        colors.sort();
        colors.dedup();
        assert_eq!(colors.len(), count);
    }
}
