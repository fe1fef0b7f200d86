//! The fast sandbox: a machine and an internet in fresh namespaces, made in milliseconds.
//!
//! A test's body runs *inside*: see [`sandbox`].

mod app;
mod behind;
mod builder;
mod cgroup;
mod driven;
mod kernel;
mod launch;
mod network;
mod outcome;
mod program;
mod reexec;
mod server;
mod service;
mod user;
mod varlink;
mod world;

use std::net::{IpAddr, SocketAddr};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::process::ExitCode;
use std::sync::Arc;

pub use app::{App, Connection, Traffic};
pub use behind::Host;
pub use builder::{AgentBuilder, HELPER_UID, HelperBuilder, RelayBuilder};
pub use cgroup::{Cgroup, ROOT as CGROUP_ROOT, applications_below};
pub use kernel::{Element, Rule};
pub use network::{
    Delivery, INTERNET_V4, INTERNET_V6, MACHINE_V4, MACHINE_V6, MULTIPATH_PORT, PORTS, UPLINK,
};
pub use outcome::{Outcome, by, direct, local, proxied};
pub use program::Program;
pub use reexec::Inside;
pub(crate) use reexec::bin_dir;
pub use server::{Server, ServerBuilder};
pub use service::Service;
pub use user::User;
pub use varlink::Varlink;

use crate::wire::{ServerKind, Speech, Transport};
pub(crate) use world::World;

/// Runs the body in a sandbox of its own.
///
/// Called by a test, this starts the test's own executable once more, for that one test, as a
/// process of a fresh sandbox. There, the call builds the network and runs the body. So the body
/// may do to the machine around it whatever it likes, as root; whatever it leaves behind is gone
/// with the sandbox.
///
/// # Panics
/// When the body panics, with everything it printed.
#[track_caller]
pub fn sandbox(body: impl FnOnce(&Sandbox)) {
    if !reexec::is_inside() {
        return reexec::run_this_test_inside();
    }
    body_inside(body);
    reexec::say_finished();
}

/// Runs the body of a program, rather than of a test, in a sandbox of its own: what it prints goes
/// where the program's output goes, and what it returns is the program's exit status.
///
/// Called by a program's `main` and as root, this starts the program once more, with the same
/// arguments, as a process of a fresh sandbox. There, the call builds the network and runs the
/// body. So `main` must come to this call in the same way both times.
pub fn run_in_sandbox(body: impl FnOnce(&Sandbox) -> ExitCode) -> ExitCode {
    if !reexec::is_inside() {
        return reexec::run_this_program_inside();
    }
    body_inside(body)
}

/// Runs a body inside, and shows what there is to see if it panics.
fn body_inside<T>(body: impl FnOnce(&Sandbox) -> T) -> T {
    let sandbox = Sandbox {
        world: Arc::new(World::create()),
    };
    match catch_unwind(AssertUnwindSafe(|| body(&sandbox))) {
        Ok(value) => value,
        Err(panic) => {
            sandbox.explain();
            resume_unwind(panic);
        }
    }
}

/// The machine under test, with its uplink to a small internet.
pub struct Sandbox {
    world: Arc<World>,
}

impl Sandbox {
    /// A user, whose delegated cgroup subtree is made as systemd would make it.
    pub fn user(&self, uid: u32) -> User {
        User::create(&self.world, uid)
    }

    /// A cgroup anywhere on the machine, owned by root. The path is relative to the cgroup root;
    /// what is missing is made.
    pub fn cgroup(&self, path: impl AsRef<std::ffi::OsStr>) -> Cgroup {
        Cgroup::create(&self.world, std::path::Path::new(path.as_ref()), 0)
    }

    /// An application on the internet, to call the machine from outside.
    pub fn internet_app(&self) -> App {
        App::start_on_internet(&self.world)
    }

    /// A host behind the machine, which forwards from then on. The machine's end of the wire is an
    /// interface of this name.
    ///
    /// # Panics
    /// When there is such an interface.
    #[track_caller]
    pub fn host_behind(&self, interface: &str) -> Host {
        let mut hosts = behind::build(&self.world, interface, behind::Wiring::Veth, 1);
        hosts.remove(0)
    }

    /// So many hosts behind the machine, each at a port of a bridge of this name, as container
    /// engines make them.
    ///
    /// # Panics
    /// When there is such an interface.
    #[track_caller]
    pub fn hosts_on_bridge<const N: usize>(&self, bridge: &str) -> [Host; N] {
        let count = u8::try_from(N).expect("a few");
        let hosts = behind::build(&self.world, bridge, behind::Wiring::Bridge, count);
        hosts.try_into().unwrap_or_else(|_| unreachable!())
    }

    /// A TPROXY server, to be told its port and its owner.
    pub fn tproxy(&self, name: &str) -> ServerBuilder {
        ServerBuilder::new(&self.world, name, ServerKind::Tproxy)
    }

    /// An ordinary service, to be told where to listen.
    pub fn service(&self, name: &str) -> ServerBuilder {
        ServerBuilder::new(&self.world, name, ServerKind::Local)
    }

    /// Starts a program that is no part of the product on the internet, as root. Dropped, it is killed.
    ///
    /// # Panics
    /// When there is no such program.
    #[track_caller]
    pub fn internet_program(&self, argv: &[&str]) -> Program {
        Program::start(&self.world, launch::Launch::root().on_internet(), argv)
    }

    /// A SOCKS5 server on the internet, with UDP and nothing but addresses. Others see it as [`INTERNET_V4`] and
    /// [`INTERNET_V6`].
    ///
    /// # Panics
    /// When it does not listen.
    #[track_caller]
    pub fn socks_server(&self, at: std::net::SocketAddr) -> Program {
        self.on_internet(&["socks", &at.to_string()], at)
    }

    /// A proxy on the internet that knows CONNECT of HTTP, and passes on the end of each direction by itself.
    ///
    /// # Panics
    /// When it does not listen.
    #[track_caller]
    pub fn http_proxy(&self, at: std::net::SocketAddr) -> Program {
        self.on_internet(&["http", &at.to_string()], at)
    }

    /// A server on the internet that says the same to everybody, whatever it is asked.
    ///
    /// # Panics
    /// When it does not listen.
    #[track_caller]
    pub fn speaker(&self, at: std::net::SocketAddr, speech: &Speech) -> Program {
        let speech = serde_json::to_string(speech).expect("it has names for all it has");
        self.on_internet(&["speaker", &at.to_string(), &speech], at)
    }

    /// A server with every address of the internet's, which sends back whatever it is sent, and ends when that does.
    ///
    /// # Panics
    /// When it does not listen.
    #[track_caller]
    pub fn echo_server(&self, port: u16) -> Program {
        let at = std::net::SocketAddr::new(INTERNET_V4, port);
        self.on_internet(&["echo", &format!("[::]:{port}")], at)
    }

    /// A server with every address of the internet's, which hears what comes until that ends, is silent for so long, and
    /// sends it back.
    ///
    /// # Panics
    /// When it does not listen.
    #[track_caller]
    pub fn late_server(&self, port: u16, silence: std::time::Duration) -> Program {
        let at = std::net::SocketAddr::new(INTERNET_V4, port);
        let milliseconds = silence.as_millis().to_string();
        self.on_internet(&["late", &format!("[::]:{port}"), &milliseconds], at)
    }

    /// A server with every address of the internet's, which greets, ends that direction at once, and hears what comes
    /// until the other one ends. What that was is in its [log](Program::log); see [`App::hear_out`].
    ///
    /// # Panics
    /// When it does not listen.
    #[track_caller]
    pub fn listener(&self, port: u16, greeting: &str) -> Program {
        let at = std::net::SocketAddr::new(INTERNET_V4, port);
        self.on_internet(&["listener", &format!("[::]:{port}"), greeting], at)
    }

    /// A server of the test bed's own on the internet.
    #[track_caller]
    fn on_internet(&self, role: &[&str], at: std::net::SocketAddr) -> Program {
        let program = launch::binary("cgtproxy-testapp");
        let program = program.to_str().expect("a path of our own");
        self.internet_program(&[&[program], role].concat())
            .listening(at)
    }

    /// The helper, to be configured and started.
    pub fn helper(&self) -> HelperBuilder {
        HelperBuilder::helper(&self.world)
    }

    /// An address on the internet that nobody has been given yet.
    pub fn fresh_v4(&self) -> IpAddr {
        self.world.fresh_v4()
    }

    /// An address on the internet that nobody has been given yet.
    pub fn fresh_v6(&self) -> IpAddr {
        self.world.fresh_v6()
    }

    /// One fresh destination of each family, at a port where the internet answers.
    pub fn destinations(&self) -> [SocketAddr; 2] {
        [self.fresh_v4(), self.fresh_v6()].map(|address| SocketAddr::new(address, PORTS[0]))
    }

    /// Returns when every packet sent before has arrived or never will, and the servers have read
    /// and answered what reached them.
    pub fn settle(&self) {
        self.world.settle();
    }

    /// What has reached the internet for that address, of whatever protocol, once everything sent
    /// before has arrived.
    pub fn deliveries(&self, destination: IpAddr) -> Vec<Delivery> {
        self.world.settle();
        network::deliveries(destination)
    }

    /// Insists that a service of this machine at this port answers whoever asks from outside.
    ///
    /// # Panics
    /// When it does not.
    #[track_caller]
    pub fn expect_answers(&self, outside: &App, service: &str, port: u16) {
        for address in [MACHINE_V4, MACHINE_V6] {
            let at = SocketAddr::new(address, port);
            for transport in [Transport::Tcp, Transport::Udp] {
                let outcome = outside.ask(transport, at);
                assert_eq!(outcome, local(service, at), "{transport:?}");
            }
        }
    }

    /// Open connections of an application's to fresh destinations, TCP and UDP, whoever carries them.
    ///
    /// # Panics
    /// When one is not let out.
    #[must_use]
    pub fn open(&self, app: &App) -> Vec<(SocketAddr, Connection)> {
        self.destinations()
            .into_iter()
            .flat_map(|to| {
                let udp = app.open_udp(to);
                // Its first packet is what decides.
                udp.ask();
                [(to, app.open_tcp(to).expect("it is let out")), (to, udp)]
            })
            .collect()
    }

    /// Insists on what becomes of what an application asks fresh destinations of both families, by TCP and UDP.
    ///
    /// # Panics
    /// When something else becomes of it.
    #[track_caller]
    pub fn expect(&self, app: &App, outcome: impl Fn(SocketAddr) -> Outcome) {
        self.expect_each(app, |_, to| outcome(to));
    }

    /// Insists on what becomes of what an application asks, as [`expect`](Self::expect) does, where TCP and UDP differ.
    ///
    /// # Panics
    /// When something else becomes of it.
    #[track_caller]
    pub fn expect_each(&self, app: &App, outcome: impl Fn(Transport, SocketAddr) -> Outcome) {
        for to in self.destinations() {
            for transport in [Transport::Tcp, Transport::Udp] {
                let (is, should) = (app.ask(transport, to), outcome(transport, to));
                assert_eq!(is, should, "{transport:?} {to}");
            }
        }
    }

    /// Insists that nothing of an application's comes through by TCP or UDP, and that nothing leaves.
    ///
    /// # Panics
    /// When something did.
    #[track_caller]
    pub fn expect_dropped(&self, app: &App) {
        for to in self.destinations() {
            for transport in [Transport::Tcp, Transport::Udp] {
                let outcome = app.ask(transport, to);
                assert!(outcome.is_dropped(), "{transport:?} {to}: {outcome:?}");
            }
            self.assert_nothing_left_for(to.ip());
        }
    }

    /// Insists that nothing of an application's comes through by TCP, UDP or ICMP, and that nothing leaves.
    ///
    /// # Panics
    /// When something did.
    #[track_caller]
    pub fn expect_all_dropped(&self, app: &App) {
        for to in self.destinations() {
            let outcome = app.ping(to.ip());
            assert!(outcome.is_dropped(), "ping {to}: {outcome:?}");
            self.assert_nothing_left_for(to.ip());
        }
        self.expect_dropped(app);
    }

    /// Insists that no packet at all has left for that address.
    ///
    /// # Panics
    /// When one did.
    #[track_caller]
    pub fn assert_nothing_left_for(&self, destination: IpAddr) {
        let deliveries = self.deliveries(destination);
        assert!(
            deliveries.is_empty(),
            "{destination} was sent {deliveries:?}"
        );
    }

    /// How many connections to that port of the internet's, over IPv4, have bytes that nobody reads.
    ///
    /// # Panics
    /// When the kernel does not say.
    pub fn unread_connections(&self, port: u16) -> usize {
        let netns = format!("--net={}", network::NETNS);
        let table = self.run(&["nsenter", &netns, "cat", "/proc/self/net/tcp"]);
        let port = format!(":{port:04X}");
        let unread = |line: &&str| {
            // Number, own address, the other's, state, bytes to be sent and received; in hexadecimal.
            let words: Vec<&str> = line.split_whitespace().take(5).collect();
            let [_, own, _, "01", queues] = words[..] else {
                return false;
            };
            own.ends_with(&port) && !queues.ends_with(":00000000")
        };
        table.lines().filter(unread).count()
    }

    /// Counts DNS queries that leave the machine, from now on: see [`queries_left`](Self::queries_left).
    pub fn count_queries(&self) {
        let table = "table inet queries {
                         counter left {}
                         chain out {
                             type filter hook postrouting priority 300
                             oifname uplink meta l4proto { tcp, udp } th dport { 53, 853, 5353 } counter name left
                         }
                     }";
        crate::command::run_with_input(&["nft", "-f", "-"], table);
    }

    /// How many packets of DNS queries have left the machine.
    ///
    /// # Panics
    /// When nobody has counted them.
    pub fn queries_left(&self) -> u64 {
        self.world.settle();
        self.counted("queries", "left")
    }

    pub(crate) fn world(&self) -> Arc<World> {
        Arc::clone(&self.world)
    }

    /// Prints what one wants to see when a test has failed.
    fn explain(&self) {
        eprintln!("\n---- the sandbox when the test failed ----");
        self.world.print_logs();
        // Where nft finds no cgroupfs it prints the ids of control groups. Where it finds one it walks
        // the whole tree for the name of each, which takes minutes for thousands of them.
        let ruleset = "umount -l /sys/fs/cgroup; nft list ruleset";
        for command in [
            &["unshare", "-m", "sh", "-c", ruleset][..],
            &["ip", "rule"],
            &["ip", "-6", "rule"],
            &["ip", "route", "show", "table", "all", "type", "local"],
        ] {
            let output = crate::command::output_with_input(command, "");
            eprintln!(
                "$ {}\n{}",
                command.join(" "),
                String::from_utf8_lossy(&output.stdout)
            );
            eprint!("{}", String::from_utf8_lossy(&output.stderr));
        }
    }
}
