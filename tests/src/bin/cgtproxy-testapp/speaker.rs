//! Servers that do not care what they are asked.

use std::io::{Read, Result, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use cgtproxy_tests::wire::{Afterwards, Speech};
use socket2::{Domain, Socket, Type};

use crate::app::bulk;

/// Serves until it is killed.
pub(crate) fn serve(address: &str, speech: &Speech) {
    let listener = TcpListener::bind(address).expect("an address of the internet's");
    let mut held = Vec::new();
    for client in listener.incoming().flatten() {
        if speech.then == Afterwards::Repeat {
            let say = speech.say.clone();
            // It ends when the client does.
            thread::spawn(move || repeat(client, &say));
            continue;
        }
        // It is short, and the client's window is large enough. It may be gone already.
        let _ = (&client).write_all(&speech.say);
        match speech.then {
            Afterwards::Hold => held.push(client),
            // It ends when the client does.
            Afterwards::Hear => drop(thread::spawn(move || hear(client))),
            Afterwards::Close | Afterwards::Repeat => {}
        }
    }
}

/// Takes one connection at a time, and does not listen while it has one.
pub(crate) fn fleeting(address: &str) {
    loop {
        let Ok(listener) = TcpListener::bind(address) else {
            continue;
        };
        let accepted = listener.accept();
        drop(listener);
        if let Ok((client, _)) = accepted {
            hear(client);
        }
    }
}

/// Hears everybody, over `lo` alone.
pub(crate) fn bound(address: &str) {
    let listen = || {
        let address: SocketAddr = address.parse().expect("an address");
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        socket.bind_device(Some(b"lo"))?;
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())?;
        socket.listen(16)?;
        Ok::<_, std::io::Error>(TcpListener::from(socket))
    };
    let listener = listen().expect("everybody may bind a new socket to an interface");
    for client in listener.incoming().flatten() {
        thread::spawn(move || hear(client));
    }
}

fn hear(mut client: TcpStream) {
    let mut buffer = vec![0; 1 << 16];
    let mut count = 0;
    loop {
        match client.read(&mut buffer) {
            Ok(0) => return println!("heard {count} bytes and the end"),
            Ok(length) => count += length,
            Err(error) => return println!("heard {count} bytes and then: {}", error.kind()),
        }
        println!("heard {count} bytes");
    }
}

/// Sends back whatever comes, and ends when that does.
pub(crate) fn echo(address: &str) {
    let listener = TcpListener::bind(address).expect("an address of the internet's");
    for client in listener.incoming().flatten() {
        thread::spawn(move || {
            let (mut from, mut to) = (&client, &client);
            // A client that goes away in the middle is what tests do.
            let _ = std::io::copy(&mut from, &mut to);
            let _ = client.shutdown(Shutdown::Write);
        });
    }
}

/// Hears what comes until that ends, is silent for so long, sends it back, and ends.
pub(crate) fn late(address: &str, silence: Duration) {
    let listener = TcpListener::bind(address).expect("an address of the internet's");
    for mut client in listener.incoming().flatten() {
        thread::spawn(move || {
            let count = bulk::receive(&mut client)?;
            thread::sleep(silence);
            bulk::send(&mut client, count)
        });
    }
}

/// Greets, ends that direction, and says on the standard output what comes until the other one ends.
pub(crate) fn listen(address: &str, greeting: &str) {
    let listener = TcpListener::bind(address).expect("an address of the internet's");
    for mut client in listener.incoming().flatten() {
        let greeting = greeting.to_owned();
        thread::spawn(move || {
            let heard = client
                .write_all(greeting.as_bytes())
                .and_then(|()| client.shutdown(Shutdown::Write))
                .and_then(|()| bulk::receive(&mut client));
            match heard {
                Ok(count) => println!("heard {count} bytes to the end"),
                Err(error) => println!("heard no end: {error}"),
            }
        });
    }
}

fn repeat(mut client: TcpStream, say: &[u8]) -> Result<()> {
    loop {
        client.write_all(say)?;
    }
}
