//! The map of rooms in src/lib.rs, held against the sources.
//!
//! A room is a module of the crate's root. The map says which rooms each may
//! use, and lists them so that all arrows point down. Inside a room, modules side
//! by side must not use each other in a circle; a module and those below it count
//! as one there, and may use each other.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use syn::visit::{self, Visit};

/// Names of the modules from the crate's root down: `["host", "netlink"]`.
type Module = Vec<String>;

/// One use of a module by another, and the file that it stands in.
struct Arrow {
    from: Module,
    to: Module,
    file: PathBuf,
}

/// The rooms in the map's order, each with those that it may use.
struct Map(Vec<(String, BTreeSet<String>)>);

impl Map {
    /// Reads the lines `room -> room, room` of the crate's documentation.
    fn read(lib: &str) -> Self {
        let names = |list: &str| {
            let names = list.split(',').map(|name| name.trim().to_string());
            names.filter(|name| !name.is_empty()).collect()
        };
        let lines = lib.lines().filter_map(|line| line.strip_prefix("//! "));
        let arrows = lines.filter_map(|line| line.split_once(" ->"));
        Self(
            arrows
                .map(|(room, uses)| (room.trim().to_string(), names(uses)))
                .collect(),
        )
    }

    /// What is wrong with the map by itself, and with the arrows.
    fn faults(&self, arrows: &[Arrow]) -> Vec<String> {
        let mut faults = Vec::new();
        let mut above = BTreeSet::new();
        for (room, uses) in &self.0 {
            above.insert(room);
            for up in uses.iter().filter(|name| above.contains(name)) {
                faults.push(format!("the map lists {up} above {room}, which uses it"));
            }
        }
        let mut seen = BTreeSet::new();
        for arrow in arrows {
            let (Some(from), Some(to)) = (arrow.from.first(), arrow.to.first()) else {
                continue;
            };
            if from == to || !seen.insert((from, to)) {
                continue;
            }
            let uses = self.0.iter().find(|(room, _)| room == from);
            if uses.is_none_or(|(_, uses)| !uses.contains(to)) {
                let file = arrow.file.display();
                faults.push(format!("{from} may not use {to}, as {file} does"));
            }
        }
        for (from, uses) in &self.0 {
            for to in uses.iter().filter(|to| !seen.contains(&(from, *to))) {
                faults.push(format!("the map lets {from} use {to}, which it does not"));
            }
        }
        faults
    }
}

/// Circles among modules side by side.
fn circles(arrows: &[Arrow]) -> Vec<String> {
    // By parent: which of its children use which, and a file that does.
    let mut levels: BTreeMap<&[String], BTreeMap<(&str, &str), &Path>> = BTreeMap::new();
    for arrow in arrows {
        let pairs = arrow.from.iter().zip(&arrow.to);
        let depth = pairs.take_while(|(from, to)| from == to).count();
        if let (Some(from), Some(to)) = (arrow.from.get(depth), arrow.to.get(depth)) {
            let level = levels.entry(&arrow.from[..depth]).or_default();
            level.entry((from, to)).or_insert(&arrow.file);
        }
    }
    // Rooms are the map's matter.
    levels.remove(&[][..]);
    let mut faults = Vec::new();
    for (parent, mut edges) in levels {
        // What uses nothing, or is used by nothing, is in no circle.
        loop {
            let users: BTreeSet<_> = edges.keys().map(|(from, _)| *from).collect();
            let used: BTreeSet<_> = edges.keys().map(|(_, to)| *to).collect();
            let before = edges.len();
            edges.retain(|(from, to), _| users.contains(to) && used.contains(from));
            if edges.len() == before {
                break;
            }
        }
        let place = parent.join("::");
        faults.extend(edges.iter().map(|((from, to), file)| {
            let file = file.display();
            format!("crate::{place}: {from} uses {to} ({file}), and is used by it in turn")
        }));
    }
    faults
}

/// Collects what one module's code names, but for its tests.
struct Names<'a> {
    module: Module,
    file: &'a Path,
    modules: &'a BTreeSet<Module>,
    arrows: &'a mut Vec<Arrow>,
}

impl Names<'_> {
    /// Notes a path as it stands in the code.
    fn note(&mut self, path: &[String]) {
        let mut base = self.module.clone();
        let mut names = path.iter();
        match path.first().map(String::as_str) {
            Some("crate") => base.clear(),
            Some("self") => {}
            Some("super") => {
                base.pop();
            }
            _ => return,
        }
        names.next();
        for name in names {
            if name == "super" {
                base.pop();
                continue;
            }
            base.push(name.clone());
            if !self.modules.contains(&base) {
                base.pop();
                break;
            }
        }
        if base != self.module {
            self.arrows.push(Arrow {
                from: self.module.clone(),
                to: base,
                file: self.file.to_path_buf(),
            });
        }
    }

    fn note_tree(&mut self, prefix: &[String], tree: &syn::UseTree) {
        let with = |name: &syn::Ident| {
            let mut path = prefix.to_vec();
            path.push(name.to_string());
            path
        };
        match tree {
            syn::UseTree::Path(path) => self.note_tree(&with(&path.ident), &path.tree),
            syn::UseTree::Name(name) => self.note(&with(&name.ident)),
            syn::UseTree::Rename(rename) => self.note(&with(&rename.ident)),
            syn::UseTree::Glob(_) => self.note(prefix),
            syn::UseTree::Group(group) => {
                for tree in &group.items {
                    self.note_tree(prefix, tree);
                }
            }
        }
    }
}

impl<'ast> Visit<'ast> for Names<'_> {
    fn visit_item(&mut self, item: &'ast syn::Item) {
        if !is_test(attributes(item)) {
            visit::visit_item(self, item);
        }
    }

    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        let Some((_, items)) = &item.content else {
            return;
        };
        self.module.push(item.ident.to_string());
        for item in items {
            self.visit_item(item);
        }
        self.module.pop();
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        self.note_tree(&[], &item.tree);
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        if !is_test(&item.attrs) {
            visit::visit_impl_item_fn(self, item);
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let names: Vec<_> = path
            .segments
            .iter()
            .map(|one| one.ident.to_string())
            .collect();
        self.note(&names);
        visit::visit_path(self, path);
    }

    /// The arguments of a macro are no paths yet, but tokens.
    fn visit_macro(&mut self, item: &'ast syn::Macro) {
        let text = item.tokens.to_string();
        for part in text.split("crate :: ").skip(1) {
            let names = part.split(" :: ").map(|name| {
                let end = name.find(|c: char| !c.is_alphanumeric() && c != '_');
                name[..end.unwrap_or(name.len())].to_string()
            });
            let path: Vec<_> = ["crate".to_string()].into_iter().chain(names).collect();
            self.note(&path);
        }
        visit::visit_macro(self, item);
    }
}

fn attributes(item: &syn::Item) -> &[syn::Attribute] {
    match item {
        syn::Item::Const(item) => &item.attrs,
        syn::Item::Fn(item) => &item.attrs,
        syn::Item::Impl(item) => &item.attrs,
        syn::Item::Mod(item) => &item.attrs,
        syn::Item::Struct(item) => &item.attrs,
        syn::Item::Use(item) => &item.attrs,
        _ => &[],
    }
}

/// Whether code is for tests alone.
fn is_test(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        let condition = attribute.path().is_ident("cfg");
        condition
            && matches!(&attribute.meta, syn::Meta::List(list) if list.tokens.to_string() == "test")
    })
}

/// Modules that only tests have, with their files: `#[cfg(test)] mod name;`.
fn test_modules(module: &Module, code: &syn::File) -> Vec<Module> {
    let mods = code.items.iter().filter_map(|item| match item {
        syn::Item::Mod(item) if item.content.is_none() && is_test(&item.attrs) => Some(item),
        _ => None,
    });
    let child = |item: &syn::ItemMod| {
        let mut child = module.clone();
        child.push(item.ident.to_string());
        child
    };
    mods.map(child).collect()
}

/// The arrows in sources: files with their paths below src.
fn arrows(sources: &BTreeMap<PathBuf, String>) -> Vec<Arrow> {
    let mut files = Vec::new();
    let mut tests = BTreeSet::new();
    for (path, text) in sources {
        let code = syn::parse_file(text).expect("the sources compile");
        let module = module(path);
        tests.extend(test_modules(&module, &code));
        files.push((path, module, code));
    }
    // Files that a #[path] gives to a module of tests.
    files.retain(|(path, module, _)| {
        let name = path.file_stem().and_then(|stem| stem.to_str());
        !name.is_some_and(|name| name.ends_with("_tests"))
            && !tests.iter().any(|test| module.starts_with(test))
    });
    let modules = files.iter().map(|(_, module, _)| module.clone()).collect();
    let mut arrows = Vec::new();
    for (file, module, code) in &files {
        let mut names = Names {
            module: module.clone(),
            file,
            modules: &modules,
            arrows: &mut arrows,
        };
        names.visit_file(code);
    }
    arrows
}

/// The module that a file below src has: `io/uring/mod.rs` is `io::uring`.
fn module(path: &Path) -> Module {
    let path = path.with_extension("");
    let names = path.iter().map(|name| name.to_string_lossy().into_owned());
    let mut module: Module = names.collect();
    if module
        .last()
        .is_some_and(|last| last == "mod" || last == "lib")
    {
        module.pop();
    }
    module
}

fn sources(directory: &Path, root: &Path, found: &mut BTreeMap<PathBuf, String>) {
    for entry in fs::read_dir(directory).expect("src is there").flatten() {
        let path = entry.path();
        if path.is_dir() {
            sources(&path, root, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let below = path.strip_prefix(root).expect("below src").to_path_buf();
            let text = fs::read_to_string(&path).expect("a source can be read");
            found.insert(below, text);
        }
    }
}

fn example(files: &[(&str, &str)]) -> Vec<Arrow> {
    let source = |(path, text): &(&str, &str)| (PathBuf::from(path), text.to_string());
    arrows(&files.iter().map(source).collect())
}

#[test]
fn arrows_are_those_of_the_map_and_point_down() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = BTreeMap::new();
    sources(&root, &root, &mut found);
    // The binary starts the rooms; it is not one.
    found.remove(Path::new("main.rs"));
    let map = Map::read(&found[Path::new("lib.rs")]);
    assert!(map.0.len() > 5, "src/lib.rs has no map");
    let arrows = arrows(&found);
    let mut faults = map.faults(&arrows);
    faults.extend(circles(&arrows));
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn an_arrow_that_the_map_lacks_is_found() {
    let map = Map::read("//! top -> low\n//! low ->\n");
    let files = [
        ("lib.rs", "mod top; mod low;"),
        ("top.rs", "use crate::low::Thing;"),
        ("low.rs", "fn f() { println!(\"{}\", crate::top::X); }"),
    ];
    let faults = map.faults(&example(&files));
    assert_eq!(faults, ["low may not use top, as low.rs does"]);
    // Code of tests may use anything.
    let test = "#[cfg(test)] mod tests { use crate::top::X; }";
    let files = [files[0], files[1], ("low.rs", test)];
    assert_eq!(map.faults(&example(&files)), [""; 0]);
}

#[test]
fn a_map_that_points_up_or_to_what_is_not_used_is_found() {
    let map = Map::read("//! low ->\n//! top -> low\n");
    let files = [
        ("lib.rs", ""),
        ("top.rs", "use crate::low::X;"),
        ("low.rs", ""),
    ];
    assert_eq!(
        map.faults(&example(&files)),
        ["the map lists low above top, which uses it"]
    );
    let map = Map::read("//! top -> low\n//! low ->\n");
    let files = [("lib.rs", ""), ("top.rs", ""), ("low.rs", "")];
    assert_eq!(
        map.faults(&example(&files)),
        ["the map lets top use low, which it does not"]
    );
}

#[test]
fn a_circle_in_a_room_is_found() {
    let chain = [
        ("lib.rs", ""),
        ("room/mod.rs", "use self::a::A;"),
        ("room/a.rs", "use super::b::{B, X}; use super::Y;"),
        ("room/b/mod.rs", "use self::deep::D;"),
        ("room/b/deep.rs", "use super::super::c::C;"),
        ("room/c.rs", ""),
    ];
    assert_eq!(circles(&example(&chain)), [""; 0]);
    let mut circle = chain;
    circle[5].1 = "fn f() { super::a::g() }";
    assert_eq!(circles(&example(&circle)).len(), 3);
}
