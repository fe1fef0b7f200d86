//! A sandbox with one of the things that are compared running in it.

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind};
use std::net::UdpSocket;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use cgtproxy_tests::sandbox::{CGROUP_ROOT, Sandbox, Service, User};
use nix::unistd::{Gid, Uid, setfsgid, setfsuid};

use super::packets::Sender;
use super::relay::{RELAY_PORT, Server};
use super::socks;
use super::users::Users;
use crate::floor;
use crate::netlink::Counter;
use crate::order::{Kind, Mapped, Place};

/// The user whose control groups are looked at.
pub(super) const UID: u32 = 1001;

/// The level of the control groups that are made: user.slice, user-UID.slice, user@UID.service, app.slice.
const LEVEL: usize = 5;

/// The longest that anything may take before it counts as never.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// How many control groups the original is given at once. It takes note of 1024 that it has not looked at yet, and of no
/// more.
const ORIGINAL_TAKES: usize = 256;

/// The user's configuration, which the original understands too.
pub(super) fn config() -> String {
    let proxy = format!("tproxies:\n  relay: {{ port: {RELAY_PORT}, mark: 0x520 }}");
    config_with(&proxy, "tproxy: relay")
}

/// The same with a proxy elsewhere.
fn relay_config() -> String {
    let (address, port) = socks::ADDRESS;
    let proxy = format!("proxies:\n  socks: {{ upstream: 'socks5://{address}:{port}' }}");
    config_with(&proxy, "proxy: socks")
}

fn config_with(proxy: &str, target: &str) -> String {
    format!(
        "version: 1
cgroup-root: AUTO
route-table: 300
bypass: [10.0.0.0/8, 172.16.0.0/12, 192.168.0.0/16, fc00::/7]
{proxy}
rules:
  - match: /bench-[^/]*\\.scope$
    drop: true
  - match: /verdict\\.slice$
    drop: true
  - match: /direct-[^/]*\\.scope$
    direct: true
  - match: /(proxied\\.slice|mapped-[^/]*\\.scope)$
    {target}
"
    )
}

/// What the original puts into the kernel for that configuration (its pkg/nftman), without elements.
fn layout() -> String {
    format!(
        "table inet cgtproxy {{
             set bypass {{ type ipv4_addr; flags interval; elements = {{ 10.0.0.0/8, 172.16.0.0/12, 192.168.0.0/16 }} }}
             set bypass6 {{ type ipv6_addr; flags interval; elements = {{ fc00::/7 }} }}
             map cgroup-vmap {{ type cgroupsv2 : verdict; }}
             map mark-vmap {{ type mark : verdict; }}
             map mark-dns-vmap {{ type mark : verdict; }}
             chain relay-MARK {{ meta mark set 0x520; }}
             chain relay {{ meta l4proto {{ tcp, udp }} tproxy to :{RELAY_PORT}; }}
             chain output-mangle {{
                 type route hook output priority mangle;
                 ct direction reply return
                 ip daddr @bypass return
                 ip6 daddr @bypass6 return
                 meta l4proto != {{ tcp, udp }} return
                 socket cgroupv2 level {LEVEL} vmap @cgroup-vmap
                 socket cgroupv2 level 4 vmap @cgroup-vmap
             }}
             chain output-nat {{
                 type nat hook output priority -100;
                 meta mark vmap @mark-dns-vmap
             }}
             chain prerouting {{
                 type filter hook prerouting priority mangle;
                 ip daddr @bypass return
                 ip6 daddr @bypass6 return
                 meta mark vmap @mark-vmap
             }}
         }}
         add element inet cgtproxy mark-vmap {{ 0x520 : goto relay }}
"
    )
}

/// The kernel tracks connections wherever a rule asks for one; no packet of these machines is forwarded.
const CONNTRACK: &str = "table inet conntrack {
    chain forward { type filter hook forward priority mangle; ct direction reply return; }
}";

/// What runs, and what was made so far.
pub(super) struct Site<'a> {
    pub(super) sandbox: &'a Sandbox,
    pub(super) kind: Kind,
    pub(super) user: User,
    pub(super) helper: Option<Service>,
    pub(super) agent: Option<Service>,
    /// The floor, or the original.
    program: Option<Child>,
    pub(super) counter: Option<Counter>,
    /// Where control groups are made.
    pub(super) base: PathBuf,
    pub(super) mapped: usize,
    pub(super) number: usize,
    /// The TPROXY server.
    pub(super) relay: Option<Server>,
    /// The SOCKS5 server.
    pub(super) socks: Option<Server>,
    /// cgtproxy-relay.
    pub(super) carrier: Option<Service>,
    pub(super) users: Users,
    pub(super) senders: Vec<Sender>,
    /// Takes what senders send, and forgets it.
    _sink: UdpSocket,
}

impl Drop for Site<'_> {
    fn drop(&mut self) {
        if let Some(child) = &mut self.program {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl<'a> Site<'a> {
    pub(super) fn set_up(sandbox: &'a Sandbox, kind: Kind) -> Self {
        let user = sandbox.user(UID);
        let base = user.cgroup("app.slice").directory();
        let mut this = Self {
            sandbox,
            kind,
            user,
            helper: None,
            agent: None,
            program: None,
            counter: None,
            base,
            mapped: 0,
            number: 0,
            relay: None,
            socks: None,
            carrier: None,
            users: Users::default(),
            senders: Vec::new(),
            _sink: UdpSocket::bind(("127.0.0.1", crate::birth::PORT)).expect("nobody has it"),
        };
        let counter = |table, map| Some(Counter::new(table, map).expect("a netlink socket"));
        match kind {
            Kind::None => {}
            Kind::Conntrack => nft(CONNTRACK),
            Kind::Floor => {
                nft(&floor::ruleset(LEVEL));
                this.program = Some(floor_program(&this.base));
                this.counter = counter(floor::TABLE, floor::MAP);
            }
            Kind::Layout => {
                nft(&layout());
                this.layout_routing();
                this.counter = counter("cgtproxy", "cgroup-vmap");
            }
            Kind::Original => {
                this.program = Some(original());
                this.counter = counter("cgtproxy", "cgroup-vmap");
                this.await_count(0);
            }
            Kind::Ours | Kind::Closed | Kind::Unprotected | Kind::Unlimited | Kind::Relay => {
                let calls = match kind {
                    Kind::Unlimited => ", calls-per-second: 1000000",
                    _ => "",
                };
                let mut helper =
                    format!("mark-mask: 0xfff00000\nlimits: {{ control-groups: 32768{calls} }}\n");
                if kind == Kind::Unprotected {
                    helper += "own-table: false\n";
                }
                this.helper = Some(sandbox.helper().config(&helper).start());
                let config = match kind {
                    Kind::Closed => config() + "start: closed\n",
                    Kind::Relay => {
                        this.carrier = Some(this.user.relay().start());
                        relay_config()
                    }
                    _ => config(),
                };
                this.agent = Some(this.user.agent(&config).start());
                this.counter = counter("cgtproxy", "cgroups");
            }
        }
        this
    }

    fn layout_routing(&self) {
        for family in ["-4", "-6"] {
            let ip = |arguments: &[&str]| {
                self.sandbox.run(&[&["ip", family], arguments].concat());
            };
            ip(&["rule", "add", "fwmark", "0x520", "lookup", "300"]);
            ip(&[
                "route", "add", "local", "default", "dev", "lo", "table", "300",
            ]);
        }
    }

    /// A name that was not used yet.
    pub(super) fn fresh(&mut self) -> usize {
        self.number += 1;
        self.number
    }

    /// Makes control groups that have a verdict of their own until there are so many.
    pub(super) fn map(&mut self, groups: usize, verdict: Mapped) {
        let missing = groups.saturating_sub(self.mapped);
        if self.kind == Kind::Original && missing > ORIGINAL_TAKES {
            self.map(groups - ORIGINAL_TAKES, verdict);
            return self.map(groups, verdict);
        }
        let before = self.elements();
        let prefix = match verdict {
            Mapped::Dropped => "bench-map",
            Mapped::Proxied => "mapped",
        };
        let made: Vec<PathBuf> = (0..missing)
            .map(|_| {
                let name = format!("{prefix}-{}.scope", self.fresh());
                self.base.join(name)
            })
            .collect();
        self.make(&made);
        self.mapped += missing;
        match self.kind {
            Kind::None | Kind::Conntrack => {}
            Kind::Layout => {
                use std::os::unix::fs::MetadataExt;
                let ids: Vec<u64> = made
                    .iter()
                    .map(|d| fs::metadata(d).expect("it was just made").ino())
                    .collect();
                let mut writer =
                    crate::netlink::Writer::new("cgtproxy", "cgroup-vmap").expect("a socket");
                for ids in ids.chunks(500) {
                    writer.change(ids, &[]).expect("the kernel takes them");
                }
            }
            _ => {
                self.await_count(before + missing);
            }
        }
    }

    /// Makes directories as the user does, so that they are the user's.
    pub(super) fn make(&self, directories: &[PathBuf]) {
        let own = (setfsgid(Gid::from_raw(UID)), setfsuid(Uid::from_raw(UID)));
        for directory in directories {
            fs::create_dir(directory)
                .unwrap_or_else(|e| panic!("can't make {}: {e}", directory.display()));
        }
        setfsuid(own.1);
        setfsgid(own.0);
    }

    pub(super) fn remove(&self, directory: &Path) {
        let started = Instant::now();
        // A process that has just ended may still be leaving.
        while let Err(error) = fs::remove_dir(directory) {
            assert!(
                started.elapsed() < PATIENCE,
                "{}: {error}",
                directory.display()
            );
        }
    }

    /// How many elements the kernel has: none where there is no table.
    pub(super) fn elements(&self) -> usize {
        match self.counter.as_ref().map(Counter::count) {
            None => 0,
            Some(Ok(count)) => count,
            Some(Err(error)) if error.kind() == ErrorKind::NotFound => 0,
            Some(Err(error)) => panic!("can't count the elements: {error}"),
        }
    }

    /// Waits until the kernel has so many.
    pub(super) fn await_count(&self, count: usize) {
        let Some(counter) = &self.counter else { return };
        let started = Instant::now();
        while counter.count().map_or(true, |n| n < count) {
            assert!(
                started.elapsed() < PATIENCE,
                "{} of {count} elements after {PATIENCE:?}",
                self.elements()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// The directory of a place, which is made if it is not there, with its verdict in force.
    pub(super) fn place(&mut self, place: Place) -> PathBuf {
        let below = match place {
            Place::Direct => "proxied.slice/direct-a.scope",
            Place::DirectDeep => {
                "proxied.slice/p1.slice/p2.slice/p3.slice/p4.slice/p5.slice/p6.slice/p7.slice/direct-b.scope"
            }
            Place::Unmatched => "app.slice/other.scope",
            Place::Proxied => "proxied.slice/app.scope",
            Place::NoSession => {
                return self
                    .sandbox
                    .cgroup("system.slice/other.service")
                    .directory();
            }
        };
        let directory = self.user.service().directory().join(below);
        if directory.exists() {
            return directory;
        }
        let before = self.elements();
        let new_slice = !self
            .user
            .service()
            .directory()
            .join("proxied.slice")
            .exists();
        self.user.cgroup(below);
        let direct = matches!(place, Place::Direct | Place::DirectDeep);
        let elements = usize::from(direct) + usize::from(new_slice && place != Place::Unmatched);
        match self.kind {
            Kind::Layout => self.layout_elements(below, direct),
            Kind::Ours | Kind::Closed | Kind::Relay | Kind::Original => {
                self.await_count(before + elements);
            }
            _ => {}
        }
        directory
    }

    fn layout_elements(&self, below: &str, direct: bool) {
        let root = format!("user.slice/user-{UID}.slice/user@{UID}.service");
        let mut elements = String::new();
        if below.starts_with("proxied.slice") {
            elements += &format!("\"{root}/proxied.slice\" : goto relay-MARK, ");
        }
        if direct {
            elements += &format!("\"{root}/{below}\" : return");
        }
        if !elements.is_empty() {
            nft(&format!(
                "add element inet cgtproxy cgroup-vmap {{ {elements} }}"
            ));
        }
    }

    /// The processes whose computing is counted.
    pub(super) fn processes(&self) -> Vec<(&'static str, u32)> {
        let services = [("helper", &self.helper), ("agent", &self.agent)]
            .into_iter()
            .filter_map(|(name, service)| Some((name, service.as_ref()?.pid())));
        let program = self
            .program
            .iter()
            .map(|child| (self.kind.name(), child.id()));
        services.chain(program).collect()
    }
}

/// Runs nft on a script.
pub(super) fn nft(script: &str) {
    use std::io::Write;
    let mut child = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .spawn()
        .expect("nft can be started");
    let mut input = child.stdin.take().expect("piped");
    input.write_all(script.as_bytes()).expect("nft reads");
    drop(input);
    assert!(child.wait().expect("it ends").success(), "nft -f: {script}");
}

/// This very program, started in a control group.
pub(super) fn launched_in(directory: &Path) -> Command {
    let mut command = Command::new("/run/testbed/bin/cgtproxy-testapp");
    command.arg("launch").arg(directory);
    command.arg(this_program().get_program());
    command
}

/// This very program, inside.
pub(super) fn this_program() -> Command {
    Command::new("/run/testbed/bin/cgtproxy-bench")
}

fn floor_program(directory: &Path) -> Child {
    let mut child = this_program()
        .arg("--floor")
        .arg(directory)
        .stdout(Stdio::piped())
        .spawn()
        .expect("this very program");
    let mut line = String::new();
    BufReader::new(child.stdout.take().expect("piped"))
        .read_line(&mut line)
        .expect("it says when it is ready");
    child
}

fn original() -> Child {
    let path = Path::new("/run/original.yaml");
    fs::write(path, config()).expect("/run is ours");
    journal();
    // It says things twice if its standard error is a character device, be it /dev/null.
    let errors = fs::File::create("/run/original.log").expect("/run is ours");
    Command::new("cgtproxy")
        .arg("--config")
        .arg(path)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(errors)
        .spawn()
        .expect("the original can be started")
}

/// Takes what the original tells the journal, and forgets it: without a journal it complains of that each time.
fn journal() {
    let path = Path::new("/run/systemd/journal/socket");
    fs::create_dir_all(path.with_file_name("")).expect("/run is ours");
    let socket = UnixDatagram::bind(path).expect("/run is ours");
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while socket.recv(&mut buffer).is_ok() {}
    });
}

/// The control group root, inside.
pub(super) fn root() -> &'static Path {
    Path::new(CGROUP_ROOT)
}
