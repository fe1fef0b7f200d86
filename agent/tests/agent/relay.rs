//! What the relay is told. That it does it is shown by its own tests.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use serde_json::{Value, json};

use crate::fake::{PATIENCE, fault};
use crate::target::await_target;
use crate::world::World;

/// The port that the relay listens on for its first proxy.
const PORT: u16 = 20_000;

/// How much higher the port for DNS queries is.
const DNS: u16 = 1000;

/// A relay that only writes down what it is told, and answers when it is let.
struct Relay {
    told: Receiver<Value>,
    answers: Sender<()>,
}

impl Relay {
    fn start(world: &World) -> Self {
        let socket = world.path().join("run/cgtproxy-relay.sock");
        let listener = UnixListener::bind(socket).unwrap();
        let (tell, told) = channel();
        let (answers, answered) = channel();
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let mut writer = stream.try_clone().unwrap();
                for message in BufReader::new(stream).split(0).map_while(Result::ok) {
                    let call: Value = serde_json::from_slice(&message).unwrap();
                    let call = call["parameters"].clone();
                    let upstreams = call["upstreams"].as_array().unwrap();
                    let listeners: Vec<_> = (PORT..)
                        .zip(upstreams)
                        .map(|(port, u)| {
                            let dns = (u["fakeDns"] == true).then_some(port + DNS);
                            json!({ "name": u["name"], "port": port, "dnsPort": dns })
                        })
                        .collect();
                    if tell.send(call).is_err() || answered.recv().is_err() {
                        return;
                    }
                    let reply = json!({ "parameters": { "listeners": listeners } });
                    let reply = [reply.to_string().as_bytes(), b"\0"].concat();
                    if writer.write_all(&reply).is_err() {
                        break;
                    }
                }
            }
        });
        Self { told, answers }
    }

    /// The host and the preferred port of the proxy that it is told of next. The one for DNS queries goes with that.
    fn is_told(&self) -> (String, Option<u64>) {
        let call = self.told.recv_timeout(PATIENCE).expect("it is told");
        let upstream = &call["upstreams"][0];
        let host = upstream["host"].as_str().unwrap().to_owned();
        let port = upstream["preferredPort"].as_u64();
        let dns = port.map(|port| port + u64::from(DNS));
        assert_eq!(upstream["preferredDnsPort"].as_u64(), dns);
        (host, port)
    }

    fn answer(&self) {
        self.answers.send(()).unwrap();
    }
}

fn config(host: &str) -> String {
    format!("version: 1\nproxies: {{there: {{upstream: 'socks5h://{host}:1080'}}}}\n")
}

/// Whoever waits for a proxy of the relay's waits until connections get there.
#[test]
fn a_proxy_is_in_force_when_the_helper_knows_where_it_is() {
    let mut world = World::new(&config("one"));
    let relay = Relay::start(&world);
    world.helper.start();
    let mut agent = world.agent();
    relay.is_told();
    let slice = "cgtproxy.slice/cgtproxy-there.slice";
    world.make(&["cgtproxy.slice", slice]);
    let path = format!("{}/{slice}", world.prefix);
    world
        .helper
        .wait("the slice", |books| books.held.contains_key(slice));
    let error = await_target(&agent, &path, "there").unwrap_err();
    assert_eq!(error.0, "NotConnected");
    let problem = error.1["problem"].as_str().unwrap();
    assert!(problem.contains("the relay has not said"), "{problem}");
    // Nor is it while the helper is being told.
    world.helper.books().paused = true;
    let calls = world.helper.books().calls.len();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            relay.answers.send(()).unwrap();
            world
                .helper
                .wait("the call", |books| books.calls.len() > calls);
            // Longer than it takes to answer at once.
            std::thread::sleep(Duration::from_millis(50));
            world.helper.resume();
        });
        assert_eq!(await_target(&agent, &path, "there"), Ok(()));
        let books = world.helper.books();
        assert_eq!(books.proxies[0].port, i64::from(PORT));
    });
    world.notified("READY=1");
    // And when it is gone, as soon as it is told of something.
    drop(relay.answers);
    world.write(&config("two"));
    agent.says("lost the relay");
    let error = await_target(&agent, &path, "there").unwrap_err();
    assert_eq!(error.0, "NotConnected");
}

#[test]
fn is_told_of_what_comes_while_it_is_being_told() {
    let mut world = World::new(&config("one"));
    let relay = Relay::start(&world);
    world.helper.start();
    let mut agent = world.agent();
    assert_eq!(relay.is_told(), ("one".into(), None));
    world.write(&config("two"));
    agent.says("loaded ");
    relay.answer();
    assert_eq!(relay.is_told(), ("two".into(), Some(PORT.into())));
    relay.answer();
    world.notified("READY=1");
}

/// The helper may refuse what is to replace it.
#[test]
fn is_told_to_keep_what_the_helper_holds_still() {
    let mut world = World::new(&config("one"));
    let relay = Relay::start(&world);
    world.helper.start();
    let _agent = world.agent();
    relay.is_told();
    relay.answer();
    world.notified("READY=1");
    let told = || {
        let call = relay.told.recv_timeout(PATIENCE).expect("it is told");
        let upstreams = call["upstreams"].as_array().unwrap().iter();
        let names: Vec<_> = upstreams
            .map(|u| u["name"].as_str().unwrap().to_owned())
            .collect();
        relay.answer();
        (
            names.join(" "),
            call["fakeIpv4"].as_str().map(str::to_owned),
        )
    };
    world.helper.books().paused = true;
    let other = config("two").replace("there", "other");
    world.write(&format!("{other}fake-addresses: 100.64.0.0/16\n"));
    assert_eq!(told(), ("there other".into(), None));
    world.helper.resume();
    assert_eq!(told(), ("other".into(), Some("100.64.0.0/16".into())));
}

/// Of that proxy, connections are open.
#[test]
fn is_not_told_of_a_proxy_that_the_helper_refuses() {
    let mut world = World::new(&config("one"));
    let relay = Relay::start(&world);
    world.helper.start();
    let mut agent = world.agent();
    relay.is_told();
    relay.answer();
    world.notified("READY=1");
    let refusal = fault("TooManyProxies", json!({ "limit": 0 }));
    world.helper.books().faults.push_back(refusal);
    world.write(&config("two"));
    agent.says("the old configuration stays");
    world.write(&config("three"));
    assert_eq!(relay.is_told(), ("three".into(), Some(PORT.into())));
    relay.answer();
}
