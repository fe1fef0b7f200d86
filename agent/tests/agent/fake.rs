//! A helper that only keeps books: what it was told, and what it would hold.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cgtproxy_proto::helper::{
    Assignment, DESCRIPTION, INTERFACE, Proxy, ReplacePolicy_Args, SkipReason,
    UpdateAssignments_Args, Verdict,
};
use cgtproxy_proto::limits::MESSAGE_BYTES;
use cgtproxy_proto::path::ControlGroupPath;
use cgtproxy_proto::service::{
    Answer, Fault, Identity, Parameters, Service, parameters, reply, serve_stream,
};
use serde_json::{Value, json};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::oneshot;

/// Longer than anything takes on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// What the helper was told and what it does about it.
#[derive(Default)]
pub(crate) struct Books {
    /// Methods that were called, in order.
    pub(crate) calls: Vec<String>,
    /// Every path that was ever assigned.
    pub(crate) named: BTreeSet<String>,
    /// Path below the subtree's root to target, and the directory's inode when it was looked up.
    pub(crate) held: BTreeMap<String, (String, u64)>,
    pub(crate) proxies: Vec<Proxy>,
    pub(crate) bypass: Vec<String>,
    /// There is a session.
    pub(crate) session: bool,
    /// What the next calls are answered with.
    pub(crate) faults: VecDeque<Fault>,
    /// Answer nothing.
    pub(crate) paused: bool,
    /// Pass over these.
    pub(crate) skip: BTreeMap<String, SkipReason>,
    pub(crate) generation: i64,
    /// Root has a policy for the machine.
    pub(crate) system_policy: bool,
    /// What it says that it holds; none: it can't be asked for its state.
    pub(crate) says: Option<&'static str>,
}

struct Shared {
    books: Mutex<Books>,
    changed: Condvar,
    /// The directory of the subtree's root.
    subtree: PathBuf,
}

/// A helper in a thread of its own.
pub(crate) struct Helper {
    shared: Arc<Shared>,
    socket: PathBuf,
    running: Option<(oneshot::Sender<()>, JoinHandle<()>)>,
}

/// The name of an error of the helper's.
pub(crate) fn fault(name: &str, parameters: Value) -> Fault {
    Fault::new(INTERFACE, name, parameters)
}

impl Helper {
    /// A helper that does not listen yet.
    pub(crate) fn new(socket: &Path, subtree: &Path) -> Self {
        Self {
            shared: Arc::new(Shared {
                books: Mutex::default(),
                changed: Condvar::new(),
                subtree: subtree.into(),
            }),
            socket: socket.into(),
            running: None,
        }
    }

    pub(crate) fn start(&mut self) {
        let listener = std::os::unix::net::UnixListener::bind(&self.socket).unwrap();
        listener.set_nonblocking(true).unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let shared = self.shared.clone();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let listener = UnixListener::from_std(listener).unwrap();
                let accept = async {
                    loop {
                        let (stream, _) = listener.accept().await.unwrap();
                        tokio::spawn(connection(stream, shared.clone()));
                    }
                };
                tokio::select! {
                    () = accept => {}
                    _ = stopped => {}
                }
            });
        });
        self.running = Some((stop, thread));
    }

    /// Ends it and all its connections, as if it had been killed. It forgets everything.
    pub(crate) fn stop(&mut self) {
        let (stop, thread) = self.running.take().unwrap();
        stop.send(()).unwrap();
        thread.join().unwrap();
        std::fs::remove_file(&self.socket).unwrap();
        *self.books() = Books::default();
    }

    pub(crate) fn books(&self) -> MutexGuard<'_, Books> {
        self.shared.books.lock().unwrap()
    }

    /// Lets paused calls go on.
    pub(crate) fn resume(&self) {
        self.books().paused = false;
        self.shared.changed.notify_all();
    }

    /// Waits until the books are as they should be.
    pub(crate) fn wait(&self, what: &str, is: impl Fn(&Books) -> bool) {
        let end = Instant::now() + PATIENCE;
        let mut books = self.books();
        while !is(&books) {
            let left = end.saturating_duration_since(Instant::now());
            assert!(
                !left.is_zero(),
                "{what} never came: {:?}, {:?}",
                books.calls,
                books.held
            );
            books = self.shared.changed.wait_timeout(books, left).unwrap().0;
        }
    }

    /// Waits until it holds exactly this, for the directories that are there now.
    pub(crate) fn wait_for(&self, meant: &[(&str, &str)]) {
        let meant: BTreeMap<String, (String, u64)> = meant
            .iter()
            .map(|(path, target)| {
                let key = ControlGroupPath::from_wire(path).unwrap();
                let inode = self.shared.subtree.join(key.as_path()).metadata().unwrap();
                ((*path).into(), ((*target).into(), inode.ino()))
            })
            .collect();
        self.wait(&format!("{meant:?}"), |books| {
            books.session && books.held == meant
        });
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        if self.running.is_some() {
            // A paused call must not keep the thread from ending.
            if let Ok(mut books) = self.shared.books.lock() {
                books.paused = false;
            }
            self.stop();
        }
    }
}

async fn connection(stream: UnixStream, shared: Arc<Shared>) {
    let mut service = Connection(shared);
    let _ = serve_stream(stream, MESSAGE_BYTES, &mut service).await;
    service.0.books.lock().unwrap().session = false;
    service.0.changed.notify_all();
}

struct Connection(Arc<Shared>);

impl Connection {
    fn status(&self, session: &str) -> Value {
        let books = self.0.books.lock().unwrap();
        json!({
            "version": "0",
            "session": session,
            "generation": books.generation,
            "proxies": [],
            "controlGroups": books.held.len(),
            "ipv6": true,
            "tableOwned": true,
            "proxyUids": [],
            "systemPolicy": books.system_policy,
        })
    }

    fn assign(&self, books: &mut Books, list: Vec<Assignment>) -> Vec<Value> {
        let mut skipped = Vec::new();
        for assignment in list {
            let path = assignment.controlGroup;
            let target = match assignment.verdict {
                Verdict::direct => "direct".into(),
                Verdict::drop => "drop".into(),
                Verdict::dropAll => "drop-all".into(),
                Verdict::proxy => assignment.proxy.unwrap(),
            };
            books.named.insert(path.clone());
            let on_disk = ControlGroupPath::from_wire(&path).unwrap();
            let directory = self.0.subtree.join(on_disk.as_path());
            match (books.skip.get(&path), directory.metadata()) {
                (Some(reason), _) => {
                    skipped.push(json!({ "controlGroup": path, "reason": reason }));
                }
                (None, Ok(metadata)) => {
                    books.held.insert(path, (target, metadata.ino()));
                }
                (None, Err(_)) => {
                    books.held.remove(&path);
                    skipped.push(json!({ "controlGroup": path, "reason": "missing" }));
                }
            }
        }
        skipped
    }
}

impl Service for Connection {
    const IDENTITY: Identity = Identity {
        product: "fake",
        version: "0",
        interface: INTERFACE,
        description: DESCRIPTION,
    };

    async fn call(&mut self, method: &str, arguments: Parameters<'_>) -> Result<Answer, Fault> {
        // Whoever asks for its state changes nothing.
        let says = self.0.books.lock().unwrap().says;
        if let ("GetStatus", Some(session)) = (method, says) {
            return reply(self.status(session));
        }
        // What is asked is on the books before it is answered.
        self.0.books.lock().unwrap().calls.push(method.into());
        self.0.changed.notify_all();
        while self.0.books.lock().unwrap().paused {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let shared = self.0.clone();
        let mut books = shared.books.lock().unwrap();
        let answer = if let Some(fault) = books.faults.pop_front() {
            Err(fault)
        } else {
            match method {
                "ReplacePolicy" => {
                    let call: ReplacePolicy_Args = parameters(arguments)?;
                    books.held.clear();
                    books.session = true;
                    books.proxies = call.proxies;
                    books.bypass = call.bypass;
                    Ok(self.assign(&mut books, call.assignments))
                }
                "UpdateAssignments" if !books.session => Err(fault("NoSession", json!({}))),
                "UpdateAssignments" => {
                    let call: UpdateAssignments_Args = parameters(arguments)?;
                    for path in call.remove {
                        books.held.remove(&path);
                        assert!(books.named.contains(&path), "{path} was never assigned");
                    }
                    Ok(self.assign(&mut books, call.assign))
                }
                "RemovePolicy" => {
                    books.session = false;
                    books.held.clear();
                    Ok(Vec::new())
                }
                _ => Err(Fault::method_not_found(method)),
            }
        };
        books.generation += 1;
        let generation = books.generation;
        drop(books);
        shared.changed.notify_all();
        match (method, answer?) {
            ("RemovePolicy", _) => reply(json!({})),
            (_, skipped) => reply(json!({ "generation": generation, "skipped": skipped })),
        }
    }

    fn message_too_large(limit: usize) -> Fault {
        fault("MessageTooLarge", json!({ "limit": limit }))
    }
}
