//! Users and groups that the file names.

use cgtproxy_proto::yaml::{Node, Value};
use nix::errno::Errno;
use nix::unistd::{Group, User};

use super::Problem;
use super::reader::{Entry, Wrong, set_all, shown, wrong_value};
use crate::access::Accounts;

/// What a database has names and numbers of.
#[derive(Debug, Clone, Copy)]
pub(super) enum Account {
    User,
    Group,
}

impl Account {
    /// What an account is called, and the name of its database.
    fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::User => ("user", "passwd"),
            Self::Group => ("group", "group"),
        }
    }

    /// The number that goes with a name, if there is one.
    fn number(self, name: &str) -> Result<Option<u32>, Errno> {
        let number = match self {
            Self::User => User::from_name(name).map(|user| Some(user?.uid.as_raw())),
            Self::Group => Group::from_name(name).map(|group| Some(group?.gid.as_raw())),
        };
        match number {
            // Some databases say so that there is none (getpwnam_r(3)).
            Err(Errno::ENOENT | Errno::ESRCH) => Ok(None),
            number => number,
        }
    }

    /// The number of the one that an entry names or numbers.
    fn resolve(self, node: &Node, key: &str) -> Result<u32, Problem> {
        let (noun, database) = self.names();
        let unknown = |name: &str, error: Errno| Problem::Unknown {
            place: node.place,
            name: name.to_owned(),
            source: error.into(),
        };
        let number = match &node.value {
            Value::Integer(number) => u32::try_from(*number).ok(),
            Value::Text(name) => match self.number(name).map_err(|e| unknown(name, e))? {
                Some(number) => Some(number),
                None => {
                    let help = match node.value.without_quotes() {
                        Some(Value::Integer(_)) => format!("a {noun}'s number has no quotes"),
                        _ => format!("'getent {database}' lists those there are"),
                    };
                    let message =
                        format!("'{key}' has '{name}', and there is no such {noun}; {help}");
                    return Err(Wrong::new(node, message).into());
                }
            },
            _ => None,
        };
        number.ok_or_else(|| {
            let message = format!(
                "'{key}' has {}; write names or numbers of {noun}s",
                shown(node)
            );
            Wrong::new(node, message).into()
        })
    }
}

/// The numbers of the users or groups in a list.
pub(super) fn accounts(node: &Node, key: &str, account: Account) -> Result<Vec<u32>, Problem> {
    match &node.value {
        Value::List(items) => items
            .iter()
            .map(|item| account.resolve(item, key))
            .collect(),
        _ => {
            let (noun, _) = account.names();
            let wanted = format!("a list of {noun}s, as in '[NAME, NUMBER]'");
            Err(wrong_value(node, key, &wanted).into())
        }
    }
}

/// What a map of users and groups can have.
const ENTRIES: [Entry<Accounts>; 2] = [
    ("users", |found, node, key| {
        found.uids.extend(accounts(node, key, Account::User)?);
        Ok(())
    }),
    ("groups", |found, node, key| {
        found.gids.extend(accounts(node, key, Account::Group)?);
        Ok(())
    }),
];

pub(super) fn users_and_groups(node: &Node, key: &str) -> Result<Accounts, Problem> {
    let mut found = Accounts::default();
    set_all(&mut found, node, Some(key), &ENTRIES)?;
    Ok(found)
}
