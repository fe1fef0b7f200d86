//! A sandbox with one of the things that are compared, and the process in it that measures.

use std::io::{BufRead, BufReader, Write};
use std::process::{ChildStdin, ChildStdout};

use cgtproxy_tests::sandbox::Inside;
use serde::de::DeserializeOwned;

use crate::order::{Kind, Order};

/// The argument that makes this program one that measures.
pub(crate) const MEASURE: &str = "--measure";

/// A sandbox that measures when it is told to.
pub(crate) struct Yard {
    pub(crate) kind: Kind,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
    _inside: Inside,
}

impl Yard {
    /// Makes the sandbox and starts what is to run in it.
    pub(crate) fn start(kind: Kind) -> Self {
        let name = serde_json::to_string(&kind).expect("a name");
        let mut inside = Inside::start(&[MEASURE, &name]);
        let mut this = Self {
            kind,
            to: inside.child.stdin.take().expect("piped"),
            from: BufReader::new(inside.child.stdout.take().expect("piped")),
            _inside: inside,
        };
        let ready: String = this.receive();
        assert_eq!(ready, "ready");
        this
    }

    /// Has something measured.
    pub(crate) fn order<T: DeserializeOwned>(&mut self, order: &Order) -> T {
        let line = serde_json::to_string(order).expect("an order is JSON");
        writeln!(self.to, "{line}").expect("the process that measures is alive");
        self.receive()
    }

    fn receive<T: DeserializeOwned>(&mut self) -> T {
        let mut line = String::new();
        self.from.read_line(&mut line).expect("a line");
        assert!(
            !line.is_empty(),
            "measuring '{}' failed, see above",
            self.kind.name()
        );
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line}"))
    }
}
