//! A server that does not care what it is asked.

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

fn repeat(mut client: TcpStream, say: &[u8]) -> Result<()> {
    loop {
        client.write_all(say)?;
    }
}
