//! Many users: their agents' side of the conversation with the helper, spoken by this process.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::chown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rustix::process::Uid;
use rustix::thread::set_thread_res_uid;
use serde_json::{Value, json};

use super::site::{Site, root};
use crate::birth::now;

const SOCKET: &str = "/run/cgtproxy/helper.sock";
/// The uid of the first simulated user.
const FIRST: u32 = 20_000;
/// The uid of the user that floods the helper.
const HOSTILE: u32 = 19_999;

/// Simulated users.
#[derive(Default)]
pub(super) struct Users {
    sessions: Vec<Session>,
    flood: Option<Flood>,
}

struct Flood {
    stop: Arc<AtomicBool>,
    /// Of all connections together.
    answered: Arc<AtomicU64>,
    since: Instant,
    threads: Vec<JoinHandle<()>>,
}

/// A user's connection to the helper.
struct Session {
    stream: BufReader<UnixStream>,
}

impl Session {
    /// The peer's uid is that of the thread that connects.
    fn connect(uid: u32) -> Self {
        let (uid, root) = (Uid::from_raw(uid), Uid::ROOT);
        set_thread_res_uid(root, uid, root).expect("root may do that");
        let stream = UnixStream::connect(SOCKET);
        set_thread_res_uid(root, root, root).expect("the saved uid is root's");
        Self {
            stream: BufReader::new(stream.expect("the helper listens")),
        }
    }

    fn call(&mut self, method: &str, parameters: Value) -> Value {
        let method = format!("org.cgtproxy.Helper.{method}");
        self.exchange(&message(&method, parameters))
    }

    fn exchange(&mut self, message: &[u8]) -> Value {
        self.stream.get_mut().write_all(message).expect("it reads");
        let mut reply = Vec::new();
        self.stream.read_until(0, &mut reply).expect("it answers");
        reply.pop();
        let reply: Value = serde_json::from_slice(&reply).expect("JSON");
        assert_eq!(reply.get("error"), None, "{reply}");
        reply["parameters"].clone()
    }

    /// As an agent with a proxy begins.
    fn replace(&mut self, groups: usize) {
        let assignments: Vec<Value> = (0..groups).map(|n| assignment(n, "drop")).collect();
        let reply = self.call(
            "ReplacePolicy",
            json!({
                "proxies": [{ "name": "relay", "port": 7893 }],
                "bypass": ["10.0.0.0/8", "192.168.0.0/16"],
                "assignments": assignments,
            }),
        );
        assert_eq!(reply["skipped"], json!([]));
    }
}

fn message(method: &str, parameters: Value) -> Vec<u8> {
    let mut bytes = json!({ "method": method, "parameters": parameters })
        .to_string()
        .into_bytes();
    bytes.push(0);
    bytes
}

fn assignment(number: usize, verdict: &str) -> Value {
    json!({ "controlGroup": format!("app.slice/bench-{number}.scope"), "verdict": verdict })
}

fn update(number: usize, verdict: &str) -> Vec<u8> {
    let assign = [assignment(number, verdict)];
    message(
        "org.cgtproxy.Helper.UpdateAssignments",
        json!({ "assign": assign, "remove": [] }),
    )
}

impl Site<'_> {
    /// Simulates as many users as there are to be, each with control groups that have a verdict of their own.
    pub(super) fn add_users(&mut self, users: u32, groups: usize) {
        raise_limit_of_files();
        while self.users.sessions.len() < users as usize {
            let uid = FIRST + u32::try_from(self.users.sessions.len()).expect("not that many");
            make_subtree(uid, groups);
            let mut session = Session::connect(uid);
            session.replace(groups);
            self.users.sessions.push(session);
        }
    }

    /// Changes a verdict of the first simulated user's, over and over: microseconds from before the call is sent
    /// until it is answered.
    pub(super) fn updates(&mut self, count: usize) -> Vec<f64> {
        let session = self.users.sessions.first_mut().expect("there are users");
        let messages = [update(0, "direct"), update(0, "drop")];
        let mut times = Vec::with_capacity(count);
        for n in 0..count {
            let start = now();
            session.exchange(&messages[n % 2]);
            times.push((now() - start) as f64 / 1000.0);
            // An agent has pauses between events.
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        times
    }

    /// Begins a flood: one user changes verdicts as fast as the helper answers, and asks for its status over all
    /// connections that it may have.
    pub(super) fn begin_flood(&mut self) {
        make_subtree(HOSTILE, 2000);
        let mut sessions: Vec<_> = (0..16).map(|_| Session::connect(HOSTILE)).collect();
        sessions[0].replace(2000);
        let stop = Arc::new(AtomicBool::new(false));
        let answered = Arc::new(AtomicU64::new(0));
        let since = Instant::now();
        let flooding = sessions.into_iter().enumerate().map(|(n, mut session)| {
            let messages = match n {
                0 => [update(0, "direct"), update(0, "drop")],
                _ => [(); 2].map(|()| message("org.cgtproxy.Helper.GetStatus", json!({}))),
            };
            let (stop, answered) = (Arc::clone(&stop), Arc::clone(&answered));
            std::thread::spawn(move || {
                for message in messages.iter().cycle() {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    session.exchange(message);
                    answered.fetch_add(1, Ordering::Relaxed);
                }
            })
        });
        let threads = flooding.collect();
        self.users.flood = Some(Flood {
            stop,
            answered,
            since,
            threads,
        });
    }

    /// Ends the flood: how many of its calls were answered a second.
    pub(super) fn end_flood(&mut self) -> f64 {
        let flood = self.users.flood.take().expect("there is a flood");
        // Those that wait now are answered later.
        let answered = flood.answered.load(Ordering::Relaxed);
        let rate = answered as f64 / flood.since.elapsed().as_secs_f64();
        flood.stop.store(true, Ordering::Relaxed);
        for thread in flood.threads {
            thread.join().expect("no panic");
        }
        rate
    }
}

/// A user manager's control groups, as systemd would make them.
fn make_subtree(uid: u32, groups: usize) {
    let service = root().join(format!("user.slice/user-{uid}.slice/user@{uid}.service"));
    let slice = service.join("app.slice");
    fs::create_dir_all(&slice).expect("root makes control groups");
    let mut made = vec![service, slice.clone()];
    for number in 0..groups {
        let directory = slice.join(format!("bench-{number}.scope"));
        if !directory.exists() {
            fs::create_dir(&directory).expect("root makes control groups");
        }
        made.push(directory);
    }
    for directory in made {
        chown(directory, Some(uid), Some(uid)).expect("root may give away");
    }
}

/// One connection for each user is more than a shell's limit.
fn raise_limit_of_files() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("up to the hard limit");
}
