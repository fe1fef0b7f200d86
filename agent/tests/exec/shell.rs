//! The functions for shells.

use std::path::Path;
use std::process::{Command, Output};

use crate::pretender::{Asked, Behaviour, Session, stderr, stdout};

/// Runs a script in a shell that has the functions. The program is found in the PATH.
fn run(session: &mut Session, shell: &str, functions: &str, script: &str) -> Output {
    session.release = None;
    let program = Path::new(env!("CARGO_BIN_EXE_cgtproxy-exec"));
    let mut path = program.parent().unwrap().as_os_str().to_owned();
    path.push(":");
    path.push(std::env::var_os("PATH").unwrap());
    let functions = format!("{}/shell/{functions}", env!("CARGO_MANIFEST_DIR"));
    let output = Command::new(shell)
        .args(["-c", &format!(". {functions}\n{script}")])
        .env("PATH", path)
        .env("HOME", session.directory.path())
        .env("XDG_RUNTIME_DIR", session.directory.path())
        .env("DBUS_SESSION_BUS_ADDRESS", "unix:path=/nonexistent")
        .output()
        .unwrap_or_else(|error| panic!("can't run {shell}: {error}"));
    assert_eq!(stderr(&output), "");
    output
}

/// bash and zsh, which share a file.
fn in_both(test: impl Fn(&mut dyn FnMut(&str) -> Output, &mut dyn FnMut() -> Vec<Asked>)) {
    for shell in ["bash", "zsh"] {
        let session = std::cell::RefCell::new(Session::new(Behaviour::default()));
        test(
            &mut |script| run(&mut session.borrow_mut(), shell, "cgtproxy-exec.sh", script),
            &mut || session.borrow().asked(),
        );
    }
}

/// Everything that a script can say about how it was run.
const SHOW: &str = r#"
show() { printf '<%s>' "$unexported" "$@"; return 7; }
unexported='a variable'
"#;

/// The words of a command line that shells are tempted to change.
const WORDS: &str = r#"'a b' '' '*' '$HOME' "it's" --no-wait"#;
const SHOWN: &str = "<a b><><*><$HOME><it's><--no-wait>";

#[test]
fn functions_see_everything_of_the_shell() {
    in_both(|run, asked| {
        let output = run(&format!(
            "{SHOW}\ncgtproxy-exec mihomo show {WORDS}; echo $?"
        ));
        assert_eq!(stdout(&output), format!("<a variable>{SHOWN}7\n"));
        let asked = asked();
        let Asked::Start { slice, .. } = &asked[1] else {
            panic!("{asked:?}");
        };
        assert_eq!(slice, "cgtproxy-mihomo.slice");
    });
}

#[test]
fn aliases_are_expanded_once() {
    in_both(|run, _| {
        // An alias holds from the next line on.
        let output = run(&format!(
            "{SHOW}\n[ -z \"${{BASH_VERSION-}}\" ] || shopt -s expand_aliases\n\
             alias echo='no' b='show \"from alias\"'\n\
             cgtproxy-exec mihomo b {WORDS} echo"
        ));
        let shown = format!("<a variable><from alias>{SHOWN}<echo>");
        assert_eq!(stdout(&output), shown);
    });
}

#[test]
fn the_subshell_is_what_is_moved() {
    in_both(|run, asked| {
        let output = run(
            "pid() { read -r pid rest </proc/self/stat; echo \"$pid\"; }\n\
             cgtproxy-exec direct pid; echo $$",
        );
        let output = stdout(&output);
        let mut pids = output.lines();
        let (subshell, shell) = (pids.next().unwrap(), pids.next().unwrap());
        assert_ne!(subshell, shell);
        let asked = asked();
        let Asked::Start { pid, .. } = &asked[1] else {
            panic!("{asked:?}");
        };
        assert_eq!(pid.to_string(), subshell);
    });
}

#[test]
fn builtins_and_keywords_run_as_well() {
    in_both(|run, _| {
        let output = run("cgtproxy-exec direct eval 'echo $((1 + 1))'\n\
             cgtproxy-exec direct cd /usr; pwd\n\
             cgtproxy-exec direct ! false; echo $?");
        let here = std::env::current_dir().unwrap();
        assert_eq!(stdout(&output), format!("2\n{}\n0\n", here.display()));
    });
}

#[test]
fn programs_and_options_go_to_the_program() {
    in_both(|run, _| {
        let output = run(&format!(
            "cgtproxy-exec --no-wait direct /usr/bin/printf '<%s>' {WORDS}; echo\n\
             cgtproxy-exec direct sh -c 'exit 9'; echo $?\n\
             cgtproxy-exec --list"
        ));
        assert_eq!(
            stdout(&output),
            format!("{SHOWN}\n9\ndirect\ndrop\nproxy\nmihomo\nmy-proxy\n")
        );
    });
}

#[test]
fn nothing_runs_if_the_target_is_unknown() {
    for shell in ["bash", "zsh"] {
        let mut session = Session::new(Behaviour::default());
        let script = "show() { echo ran; }\ncgtproxy-exec nonsense show 2>/dev/null; echo $?";
        let output = run(&mut session, shell, "cgtproxy-exec.sh", script);
        assert_eq!(stdout(&output), "125\n", "{shell}");
    }
}

#[test]
fn fish_runs_functions_and_builtins_in_a_new_fish() {
    let mut session = Session::new(Behaviour::default());
    let output = run(
        &mut session,
        "fish",
        "cgtproxy-exec.fish",
        "function show; printf '<%s>' $argv; return 7; end\n\
         cgtproxy-exec mihomo show 'a b' '' '*' '$HOME' \"it's\" --no-wait; echo $status\n\
         cgtproxy-exec --no-wait direct string upper 'a b'\n\
         cgtproxy-exec direct sh -c 'exit 9'; echo $status\n\
         cgtproxy-exec --list",
    );
    assert_eq!(
        stdout(&output),
        format!("{SHOWN}7\nA B\n9\ndirect\ndrop\nproxy\nmihomo\nmy-proxy\n")
    );
}
