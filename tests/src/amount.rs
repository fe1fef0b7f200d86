//! Amounts that the environment may change: tests/README.md lists them.

use std::str::FromStr;

/// The number that this variable has, if it is set.
///
/// # Panics
///
/// If it is no such number.
#[must_use]
pub fn given<T: FromStr>(variable: &str) -> Option<T> {
    let text = std::env::var(variable).ok()?;
    let Ok(number) = text.parse() else {
        panic!("{variable} is {text:?}, and has to be a number");
    };
    Some(number)
}
