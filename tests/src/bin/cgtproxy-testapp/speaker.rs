//! Servers that do not care what they are asked.

use std::io::{Result, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;

use cgtproxy_tests::wire::{Afterwards, Speech};

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
        if speech.then == Afterwards::Hold {
            held.push(client);
        }
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
            let _ = client.shutdown(std::net::Shutdown::Write);
        });
    }
}

fn repeat(mut client: TcpStream, say: &[u8]) -> Result<()> {
    loop {
        client.write_all(say)?;
    }
}
