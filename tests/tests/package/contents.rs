//! What is in packages, each time that they are built.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use cgtproxy_tests::package::{build, list, workspace};
use cgtproxy_tests::sandbox::sandbox;

use crate::{OUT, files, lines, run};

/// What documents below a directory link to that is not there.
fn dead_links(root: &str) -> Vec<String> {
    let mut dead = Vec::new();
    for document in files(root).iter().filter(|path| path.ends_with(".md")) {
        let document = format!("{root}{document}");
        let text = std::fs::read_to_string(&document).unwrap();
        let links = text.split("](").skip(1);
        for link in links.map(|rest| rest.split(')').next().unwrap()) {
            let target = link.split('#').next().unwrap();
            let directory = Path::new(&document).parent().unwrap();
            if !link.starts_with("https:") && !directory.join(target).exists() {
                dead.push(format!("{document}: {link}"));
            }
        }
    }
    dead
}

/// The manifest's files as packages have them whose manual pages are compressed.
fn compressed() -> BTreeSet<String> {
    let list = list().into_iter();
    list.map(|path| {
        if path.contains("/man/") {
            format!("{path}.gz")
        } else {
            path
        }
    })
    .collect()
}

/// Builds it twice, in circumstances that should make no difference.
fn twice(kind: &str) -> String {
    let first = build(kind, &format!("{OUT}/1"), &["TZ=Asia/Shanghai"]);
    let second = build(
        kind,
        &format!("{OUT}/2"),
        &["TZ=America/New_York", "LC_ALL=C.UTF-8", "TMPDIR=/run"],
    );
    let [one, two] = [&first, &second].map(|path| std::fs::read(path).unwrap());
    assert!(one == two, "two builds of {} differ", first.display());
    first.to_str().unwrap().to_owned()
}

#[test]
fn the_debian_package_is_clean_and_the_same_each_time() {
    sandbox(|_| {
        let package = twice("deb");
        let root = format!("{OUT}/deb");
        run(Command::new("dpkg-deb").args(["--extract", &package, &root]));
        // What Debian wants to have elsewhere, or otherwise.
        let doc = "/usr/share/doc/cgtproxy";
        let mut expected = compressed();
        for path in [format!("{doc}/CHANGELOG.md"), format!("{doc}/LICENSE")] {
            assert!(expected.remove(&path), "{path}");
        }
        expected = expected
            .into_iter()
            .map(|path| path.replace("/zsh/site-functions/", "/zsh/vendor-completions/"))
            .collect();
        for name in ["changelog.gz", "changelog.Debian.gz", "copyright"] {
            expected.insert(format!("{doc}/{name}"));
        }
        expected.insert("/usr/share/lintian/overrides/cgtproxy".to_owned());
        assert_eq!(files(&root), expected);
        assert_eq!(dead_links(&root), Vec::<String>::new());
        let listed = run(Command::new("dpkg-deb").args(["--contents", &package]));
        let is_ours = |line: &&str| line.ends_with(" ./etc/cgtproxy/");
        let directory = listed.lines().find(is_ours).unwrap();
        assert!(directory.starts_with("drwxr-xr-x root/root"), "{directory}");

        let field = |name: &str| run(Command::new("dpkg-deb").args(["--field", &package, name]));
        assert!(
            field("Depends").contains("libnftnl11 (>="),
            "{}",
            field("Depends")
        );
        let lintian = [
            "--fail-on",
            "error",
            "--display-info",
            "--tag-display-limit",
            "0",
            "--allow-root",
        ];
        let found = run(Command::new("lintian").args(lintian).arg(&package));
        // What is overridden is what would be found.
        assert!(!found.contains("unused-override"), "{found}");
    });
}

#[test]
fn the_rpm_package_has_the_same_files_and_is_the_same_each_time() {
    sandbox(|_| {
        let package = twice("rpm");
        let query = |what: &[&str]| run(Command::new("rpm").arg("-qp").args(what).arg(&package));
        let packaged = lines(&query(&[
            "--queryformat",
            "[%{FILEMODES:perms} %{FILENAMES}\n]",
        ]));
        let is_file = |line: &str| line.starts_with('-').then(|| line[11..].to_owned());
        let regular: BTreeSet<_> = packaged.iter().filter_map(|line| is_file(line)).collect();
        assert_eq!(regular, compressed());
        let documents = query(&["--docfiles"]);
        assert!(
            documents.contains("/usr/share/doc/cgtproxy/README.md"),
            "{documents}"
        );
        assert_eq!(
            query(&["--licensefiles"]),
            "/usr/share/doc/cgtproxy/LICENSE\n\
             /usr/share/doc/cgtproxy/third-party-licenses\n"
        );
        let directory = "drwxr-xr-x /etc/cgtproxy";
        assert!(packaged.contains(directory), "{packaged:?}");
        let needed = query(&["--requires"]);
        assert!(needed.contains("libnftnl.so.11"), "{needed}");
    });
}

#[test]
fn the_package_for_arch_has_the_same_files() {
    sandbox(|_| {
        let arch = workspace().join("packaging/arch");
        for script in ["PKGBUILD", "cgtproxy.install"] {
            run(Command::new("bash").arg("-n").arg(arch.join(script)));
        }
        // What makepkg does with it once everything is built, with 'make' as the program that installs.
        std::fs::create_dir_all(OUT).unwrap();
        build("tarball", OUT, &[]);
        let script = r#"
            set -eu
            . "$1/packaging/arch/PKGBUILD"
            version=$(sed -n '/^\[workspace\.package\]/,/^$/s/^version = "\(.*\)"$/\1/p' "$1/Cargo.toml")
            [ "$pkgver" = "$version" ]
            [ -e "$1/packaging/arch/$install" ]
            cd "$2"
            ln -s "$1" "$pkgname-$pkgver"
            pkgdir=$2/pkg
            make() {
                command make -s BUILDDIR=/run/testbed/stripped PAPERSDIR=/run/testbed/papers "$@"
            }
            package
        "#;
        let workspace = workspace();
        run(Command::new("bash")
            .args(["-c", script, "bash"])
            .args([workspace.as_os_str(), OUT.as_ref()]));
        let mut expected: BTreeSet<_> = list()
            .into_iter()
            .map(|path| path.replace("/usr/libexec/", "/usr/lib/cgtproxy/"))
            .collect();
        for name in ["LICENSE", "third-party-licenses"] {
            expected.insert(format!("/usr/share/licenses/cgtproxy/{name}"));
        }
        assert_eq!(files(&format!("{OUT}/pkg")), expected);
        assert!(Path::new(&format!("{OUT}/pkg/etc/cgtproxy")).is_dir());
    });
}

#[test]
fn the_tarball_installs_and_uninstalls_and_is_the_same_each_time() {
    sandbox(|_| {
        let archive = twice("tarball");
        run(Command::new("tar").args(["-C", OUT, "-xf", &archive]));
        let unpacked = Path::new(&archive).file_name().unwrap().to_str().unwrap();
        let unpacked = format!("{OUT}/{}", unpacked.strip_suffix(".tar.gz").unwrap());
        let root = format!("{OUT}/root");
        let install = |what: &str| {
            // Nothing of the repository's, wherever one is.
            run(Command::new(format!("{unpacked}/packaging/install"))
                .arg(what)
                .env_clear()
                .env("PATH", std::env::var_os("PATH").unwrap())
                .env("PREFIX", "/usr")
                .env("DESTDIR", &root)
                .current_dir("/"));
        };
        install("install");
        assert_eq!(files(&root), list().into_iter().collect());
        assert_eq!(dead_links(&root), Vec::<String>::new());
        let version = run(Command::new(format!("{root}/usr/bin/cgtproxy-agent")).arg("--version"));
        let instructions = std::fs::read_to_string(format!("{unpacked}/INSTALL")).unwrap();
        let version = version.trim().replace("cgtproxy-agent", "cgtproxy");
        assert!(
            instructions.starts_with(&version),
            "{version}: {instructions}"
        );
        assert!(instructions.contains("libnftnl.so.11"), "{instructions}");
        assert!(!instructions.contains('@'), "{instructions}");
        install("uninstall");
        assert_eq!(files(&root), BTreeSet::new());
    });
}
