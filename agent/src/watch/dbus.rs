//! systemd over D-Bus: the control groups of its units.
//!
//! systemd announces units (`UnitNew`, `UnitRemoved`), changes of their state (`PropertiesChanged`) and
//! the ends of jobs (`JobRemoved`), but not the control group itself: that property is asked for when
//! one of these comes, once however many came. Everything travels over one connection in order, so an
//! answer is never older than the signals that were read before it.
//!
//! A question about a unit that is not loaded makes systemd load a stub of that name and announce it.
//! So whoever asked at each announcement would go on for ever: where it is not sure that the unit is
//! loaded, `GetUnit`, which loads nothing, comes first.
//!
//! What a unit makes below its own control group, systemd does not know.

mod units;

use std::collections::HashMap;
use std::num::{NonZeroU32, NonZeroUsize};
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use cgtproxy_proto::back_off::BackOff;
use cgtproxy_proto::path::ControlGroupPath;
use futures_core::Stream;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use zbus::message::{Body, Message, Type};
use zbus::{Connection, MessageStream, OwnedObjectPath, Variant};

use super::Hint;
use crate::subtree::Subtree;
use crate::systemd::{
    Address, BUS, BUS_PATH, MANAGER, MANAGER_PATH, Manager, SYSTEMD, runtime_directory, said,
};
use units::Units;

/// The interface that all units have.
const UNIT: &str = "org.freedesktop.systemd1.Unit";
const PROPERTIES: &str = "org.freedesktop.DBus.Properties";

/// Units that have a control group, and the interface that says which.
const KINDS: [(&str, &str); 6] = [
    (".service", "org.freedesktop.systemd1.Service"),
    (".scope", "org.freedesktop.systemd1.Scope"),
    (".slice", "org.freedesktop.systemd1.Slice"),
    (".socket", "org.freedesktop.systemd1.Socket"),
    (".mount", "org.freedesktop.systemd1.Mount"),
    (".swap", "org.freedesktop.systemd1.Swap"),
];

/// What the bus is to pass on.
const MATCHES: [&str; 3] = [
    "type='signal',sender='org.freedesktop.systemd1',\
     interface='org.freedesktop.systemd1.Manager',path='/org/freedesktop/systemd1'",
    "type='signal',sender='org.freedesktop.systemd1',\
     interface='org.freedesktop.DBus.Properties',member='PropertiesChanged',\
     path_namespace='/org/freedesktop/systemd1/unit',arg0='org.freedesktop.systemd1.Unit'",
    "type='signal',sender='org.freedesktop.DBus',interface='org.freedesktop.DBus',\
     member='NameOwnerChanged',arg0='org.freedesktop.systemd1'",
];

/// How many units are asked about at once.
const QUESTIONS: usize = 64;

/// How many messages are looked at before questions are asked and reports made.
const BATCH: usize = 512;

/// How many messages wait to be looked at.
const QUEUE: usize = 1024;

/// How many reports wait to be taken.
const REPORTS: usize = 16;

/// How long to wait before connecting again: at first and at most.
const RECONNECT: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// How long a connection may take to be made.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is reported.
#[derive(Debug)]
pub(super) enum Report {
    /// All control groups that units have; from now on, what changes is reported.
    All(Vec<(ControlGroupPath, Option<u64>)>),
    /// What has changed.
    Hints(Vec<Hint>),
    /// systemd can't be reached, for this reason; it is tried again.
    Lost(String),
}

/// Follows a systemd until it is dropped.
#[derive(Debug)]
pub(super) struct Follower {
    reports: mpsc::Receiver<Report>,
    task: AbortHandle,
}

impl Follower {
    /// Follows the systemd that is in charge of a subtree. To be called within a `LocalSet`.
    pub(super) fn start(subtree: &Subtree) -> Self {
        let addresses = match subtree.is_machines() {
            true => Address::system(),
            false => {
                let session_bus = std::env::var("DBUS_SESSION_BUS_ADDRESS").ok();
                Address::all(session_bus.as_deref(), &runtime_directory())
            }
        };
        let (sender, reports) = mpsc::channel(REPORTS);
        let task = tokio::task::spawn_local(follow(subtree.clone(), addresses, sender));
        Self {
            reports,
            task: task.abort_handle(),
        }
    }

    /// The next report. Cancel safe.
    pub(super) async fn next(&mut self) -> Report {
        match self.reports.recv().await {
            Some(report) => report,
            // Its task never ends by itself.
            None => std::future::pending().await,
        }
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Why a connection is of no use any more.
#[derive(Debug)]
enum End {
    /// Nobody takes reports any more.
    Stopped,
    Lost(String),
}

impl From<zbus::Error> for End {
    fn from(error: zbus::Error) -> Self {
        Self::Lost(said(&error))
    }
}

async fn follow(subtree: Subtree, addresses: Vec<Address>, reports: mpsc::Sender<Report>) {
    let mut back_off = BackOff::new(RECONNECT);
    loop {
        let mut failures = Vec::new();
        for address in &addresses {
            let connected = match timeout(PATIENCE, address.open()).await {
                Ok(connected) => connected.map_err(|error| said(&error)),
                Err(_) => Err("no answer".to_owned()),
            };
            let why = match connected {
                Err(why) => why,
                Ok(manager) => {
                    let mut session = Session::new(&subtree, &manager, &reports);
                    let Err(end) = session.run().await;
                    match end {
                        End::Stopped => return,
                        End::Lost(why) if session.units.were_reported() => {
                            back_off.reset();
                            failures = vec![format!("{}: {why}", address.0)];
                            break;
                        }
                        End::Lost(why) => why,
                    }
                }
            };
            failures.push(format!("{}: {why}", address.0));
        }
        if reports
            .send(Report::Lost(failures.join("; ")))
            .await
            .is_err()
        {
            return;
        }
        sleep(back_off.next_wait()).await;
    }
}

/// A question that has been sent.
#[derive(Debug)]
enum Question {
    /// A call that only must not be refused.
    Setup,
    /// Which units there are.
    List,
    /// Whether this unit is loaded.
    Loaded(String),
    /// The path of this unit's control group.
    Group(String),
    /// The id of this unit's control group.
    Id(String),
}

/// One connection to systemd.
struct Session<'a> {
    subtree: &'a Subtree,
    connection: &'a Connection,
    reports: &'a mpsc::Sender<Report>,
    /// systemd's unique name on the bus; what others send is ignored.
    owner: Option<String>,
    units: Units,
    questions: HashMap<NonZeroU32, Question>,
    outgoing: Vec<Message>,
}

impl<'a> Session<'a> {
    fn new(subtree: &'a Subtree, manager: &'a Manager, reports: &'a mpsc::Sender<Report>) -> Self {
        Self {
            subtree,
            connection: &manager.connection,
            reports,
            owner: None,
            units: Units::default(),
            questions: HashMap::new(),
            outgoing: Vec::new(),
        }
    }

    async fn run(&mut self) -> Result<std::convert::Infallible, End> {
        let mut stream = MessageStream::from(self.connection);
        stream.set_max_queued(NonZeroUsize::new(QUEUE).unwrap_or(NonZeroUsize::MIN));
        for rule in MATCHES {
            let call = Message::method_call(BUS_PATH, "AddMatch")
                .destination(BUS)
                .interface(BUS)
                .build(&rule)?;
            self.ask(call, Question::Setup);
        }
        // Without a subscriber systemd sends no signals.
        self.ask_manager("Subscribe", &(), Question::Setup)?;
        self.list()?;
        loop {
            self.ask_queued()?;
            let outgoing = std::mem::take(&mut self.outgoing);
            self.connection.send_all(&outgoing).await?;
            self.report().await?;
            for message in batch(&mut stream).await? {
                self.take(&message)?;
            }
        }
    }

    /// Sends the report that is due, if one is.
    async fn report(&mut self) -> Result<(), End> {
        let Some(report) = self.units.take_report() else {
            return Ok(());
        };
        let sent = self.reports.send(report).await;
        sent.map_err(|_| End::Stopped)
    }

    fn ask(&mut self, call: Message, question: Question) {
        self.questions
            .insert(call.primary_header().serial_num(), question);
        self.outgoing.push(call);
    }

    fn call<B>(
        &self,
        object: &str,
        interface: &str,
        method: &str,
        body: &B,
    ) -> zbus::Result<Message>
    where
        B: serde::Serialize + zbus::zvariant::DynamicType,
    {
        Message::method_call(object, method)
            .destination(SYSTEMD)
            .interface(interface)
            .build(body)
    }

    fn ask_manager<B>(&mut self, method: &str, body: &B, question: Question) -> zbus::Result<()>
    where
        B: serde::Serialize + zbus::zvariant::DynamicType,
    {
        let call = self.call(MANAGER_PATH, MANAGER, method, body)?;
        self.ask(call, question);
        Ok(())
    }

    /// Asks for all units.
    fn list(&mut self) -> zbus::Result<()> {
        self.units.list();
        self.ask_manager("ListUnits", &(), Question::List)
    }

    /// Asks about as many units as may be asked about.
    fn ask_queued(&mut self) -> zbus::Result<()> {
        while self.questions.len() < QUESTIONS
            && let Some(unit) = self.units.next_question()
        {
            let units::Question {
                name,
                object,
                loaded,
            } = unit;
            if loaded {
                self.ask_group(name, &object)?;
            } else {
                self.ask_manager("GetUnit", &name, Question::Loaded(name.clone()))?;
            }
        }
        Ok(())
    }

    fn ask_group(&mut self, name: String, object: &str) -> zbus::Result<()> {
        let Some(interface) = interface(&name) else {
            return Ok(());
        };
        let group = self.call(object, PROPERTIES, "Get", &(interface, "ControlGroup"))?;
        let id = self.call(object, PROPERTIES, "Get", &(interface, "ControlGroupId"))?;
        self.ask(group, Question::Group(name.clone()));
        self.ask(id, Question::Id(name));
        Ok(())
    }

    fn take(&mut self, message: &Message) -> Result<(), End> {
        let header = message.header();
        match message.message_type() {
            Type::Signal => {
                let (Some(interface), Some(member)) = (header.interface(), header.member()) else {
                    return Ok(());
                };
                let sender = header.sender().map(|sender| sender.as_str());
                let object = header.path().map(|path| path.as_str()).unwrap_or_default();
                if interface.as_str() == BUS {
                    return match (sender, member.as_str()) {
                        (Some(BUS), "NameOwnerChanged") => self.owner_changed(&message.body()),
                        _ => Ok(()),
                    };
                }
                if sender != self.owner.as_deref() {
                    return Ok(());
                }
                self.signal(interface.as_str(), member.as_str(), object, &message.body())?;
            }
            Type::MethodReturn | Type::Error => {
                let question = header
                    .reply_serial()
                    .and_then(|s| self.questions.remove(&s));
                let Some(question) = question else {
                    return Ok(());
                };
                if message.message_type() == Type::MethodReturn
                    && matches!(question, Question::List)
                {
                    self.owner = header.sender().map(|sender| sender.as_str().to_owned());
                }
                self.answer(question, message)?;
            }
            Type::MethodCall => {}
        }
        Ok(())
    }

    /// systemd has left the bus, or come to it.
    fn owner_changed(&mut self, body: &Body) -> Result<(), End> {
        let (_, _, owner): (&str, &str, &str) = body.deserialize()?;
        if owner.is_empty() {
            return Err(End::Lost("systemd has left the bus".to_owned()));
        }
        self.owner = None;
        self.ask_manager("Subscribe", &(), Question::Setup)?;
        self.list()?;
        Ok(())
    }

    fn signal(
        &mut self,
        interface: &str,
        member: &str,
        object: &str,
        body: &Body,
    ) -> Result<(), End> {
        match (interface, member) {
            (MANAGER, "UnitNew") => {
                let (name, object): (&str, OwnedObjectPath) = body.deserialize()?;
                if !self.units.contains(name) {
                    self.units.changed(name, Some(object.as_str()), false);
                }
            }
            (MANAGER, "UnitRemoved") => {
                let (name, _): (&str, OwnedObjectPath) = body.deserialize()?;
                self.units.removed(name);
            }
            (MANAGER, "JobRemoved") => {
                let (_, _, name, _): (u32, OwnedObjectPath, &str, &str) = body.deserialize()?;
                self.units.changed(name, None, false);
            }
            // Units may be others now, or have others' names.
            (MANAGER, "Reloading") => {
                let active: bool = body.deserialize()?;
                if !active {
                    self.list()?;
                }
            }
            (PROPERTIES, "PropertiesChanged") => {
                let (of, changes, _): (&str, HashMap<&str, Variant<'_>>, Vec<&str>) =
                    body.deserialize()?;
                if of == UNIT
                    && let Some(name) = unit_name(object)
                {
                    // One that has ended may be unloaded by the time it is asked about.
                    let state = changes.get("ActiveState");
                    let state = state.and_then(|s| s.downcast_ref::<&str>().ok());
                    let ended = matches!(state, None | Some("inactive" | "failed"));
                    self.units.changed(&name, Some(object), !ended);
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn answer(&mut self, question: Question, message: &Message) -> Result<(), End> {
        let body = message.body();
        let refused = message.message_type() == Type::Error;
        match question {
            Question::Setup | Question::List if refused => {
                let text = body.deserialize::<&str>().ok().map(str::to_owned);
                let name = message.header().error_name().map(|name| name.to_string());
                let why = text.or(name).unwrap_or_default();
                return Err(End::Lost(why));
            }
            Question::Setup => {}
            Question::List => {
                type Listed<'b> = (
                    &'b str,
                    &'b str,
                    &'b str,
                    &'b str,
                    &'b str,
                    &'b str,
                    OwnedObjectPath,
                    u32,
                    &'b str,
                    OwnedObjectPath,
                );
                let listed: Vec<Listed<'_>> = body.deserialize()?;
                let units = listed.iter().map(|(name, _, _, active, _, _, object, ..)| {
                    (*name, object.as_str(), *active != "inactive")
                });
                self.units.listed(units);
            }
            Question::Loaded(name) if refused => {
                // It is gone, and its `UnitRemoved` has been seen or is on its way.
                self.units.removed(&name);
            }
            Question::Loaded(name) => {
                let object: OwnedObjectPath = body.deserialize()?;
                if self.units.contains(&name) {
                    self.ask_group(name, object.as_str())?;
                }
            }
            Question::Group(name) => {
                let path = body.deserialize::<Variant<'_>>().ok();
                let path = path.as_ref().and_then(|p| p.downcast_ref::<&str>().ok());
                let path = path.filter(|path| !path.is_empty() && !refused);
                let path = path.and_then(|path| self.subtree.relative(path.as_bytes()));
                self.units.answered_path(&name, path);
            }
            Question::Id(name) => {
                // systemd has the property since version 252.
                let id = body.deserialize::<Variant<'_>>().ok();
                let id = id.and_then(|id| id.downcast_ref::<u64>().ok());
                self.units.answered_id(&name, id.filter(|_| !refused));
            }
        }
        Ok(())
    }
}

/// Waits for messages and returns those that there are, at most [`BATCH`].
async fn batch(stream: &mut MessageStream) -> Result<Vec<Message>, End> {
    let mut batch = Vec::new();
    std::future::poll_fn(|context| {
        while batch.len() < BATCH {
            match Pin::new(&mut *stream).poll_next(context) {
                Poll::Ready(Some(Ok(message))) => batch.push(message),
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(error.into())),
                Poll::Ready(None) => {
                    let why = "the connection was closed".to_owned();
                    return Poll::Ready(Err(End::Lost(why)));
                }
                Poll::Pending if batch.is_empty() => return Poll::Pending,
                Poll::Pending => break,
            }
        }
        Poll::Ready(Ok(std::mem::take(&mut batch)))
    })
    .await
}

/// The interface that tells a unit's control group; none if it is of a kind that has none.
fn interface(name: &str) -> Option<&'static str> {
    let kind = KINDS.iter().find(|(suffix, _)| name.ends_with(suffix));
    kind.map(|(_, interface)| *interface)
}

/// The unit whose object this is: systemd writes what is neither letter nor digit as `_` and two
/// hexadecimal digits.
fn unit_name(object: &str) -> Option<String> {
    let escaped = object.strip_prefix("/org/freedesktop/systemd1/unit/")?;
    let mut bytes = Vec::with_capacity(escaped.len());
    let mut rest = escaped.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        match (first, after.split_at_checked(2)) {
            (b'_', Some((digits, after))) => {
                let digits = std::str::from_utf8(digits).ok()?;
                bytes.push(u8::from_str_radix(digits, 16).ok()?);
                rest = after;
            }
            (b'_', None) => return None,
            _ => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_units() {
        let unit = |escaped: &str| unit_name(&format!("/org/freedesktop/systemd1/unit/{escaped}"));
        assert_eq!(unit("app_2dx_2escope").as_deref(), Some("app-x.scope"));
        assert_eq!(unit("_2d_2eslice").as_deref(), Some("-.slice"));
        assert_eq!(
            unit("a_5cx2db_2eservice").as_deref(),
            Some("a\\x2db.service")
        );
        for broken in ["a_", "a_2", "a_zz", "_ff"] {
            assert_eq!(unit(broken), None, "{broken}");
        }
        assert_eq!(unit_name("/org/freedesktop/systemd1/job/1"), None);
    }

    #[test]
    fn only_some_units_have_control_groups() {
        for (name, has) in [
            ("a.service", true),
            ("-.slice", true),
            ("init.scope", true),
            ("dev-sda.device", false),
            ("basic.target", false),
            ("x.timer", false),
        ] {
            assert_eq!(interface(name).is_some(), has, "{name}");
        }
    }
}
