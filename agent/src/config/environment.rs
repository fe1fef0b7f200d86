//! The proxy that the environment names, for those who have no configuration file.

use super::upstream::{InvalidUpstream, Upstream};

/// The variables, the first one before all others. They are those that curl reads, but `all_proxy` comes first, since the
/// proxy here is for everything. `HTTP_PROXY` is none of them, since a web server hands its clients' headers to programs
/// that way.
const VARIABLES: [&str; 5] = [
    "all_proxy",
    "ALL_PROXY",
    "https_proxy",
    "HTTPS_PROXY",
    "http_proxy",
];

/// What the environment says about proxies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Environment {
    /// The proxy, and the variable that names it.
    pub proxy: Option<(&'static str, Upstream)>,
    /// Variables before that one which name none that can be used, and why.
    pub unusable: Vec<(&'static str, InvalidUpstream)>,
}

impl Environment {
    /// Reads it; `variable` looks one up.
    pub(crate) fn read(variable: impl Fn(&str) -> Option<String>) -> Self {
        let mut unusable = Vec::new();
        for name in VARIABLES {
            let Some(text) = variable(name).filter(|text| !text.is_empty()) else {
                continue;
            };
            // Many people write no scheme, and mean what curl takes it for.
            let url = match text.contains("://") {
                true => text,
                false => format!("http://{text}"),
            };
            match url.parse() {
                Ok(upstream) => {
                    let proxy = Some((name, upstream));
                    return Self { proxy, unusable };
                }
                Err(why) => unusable.push((name, why)),
            }
        }
        Self {
            proxy: None,
            unusable,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Which variable of these is used, and what it names.
    fn used(variables: &[(&str, &str)]) -> Option<(&'static str, String)> {
        let environment = Environment::read(|name| {
            let found = variables.iter().find(|(other, _)| *other == name);
            found.map(|(_, text)| (*text).to_owned())
        });
        let (name, upstream) = environment.proxy?;
        Some((name, upstream.to_string()))
    }

    #[test]
    fn each_variable_comes_before_those_after_it() {
        let all: Vec<(&str, &str)> = VARIABLES
            .into_iter()
            .zip([
                "socks5h://a:1",
                "socks5://b:2/",
                "https://c:3",
                "http://d:4/",
                "e:5",
            ])
            .collect();
        let named = [
            "socks5h://a:1",
            "socks5://b:2",
            "https://c:3",
            "http://d:4",
            "http://e:5",
        ];
        for (from, (name, named)) in VARIABLES.into_iter().zip(named).enumerate() {
            let rest: Vec<_> = all.iter().skip(from).rev().copied().collect();
            assert_eq!(used(&rest), Some((name, named.to_owned())));
        }
        assert_eq!(used(&[]), None);
        assert_eq!(used(&[("HTTP_PROXY", "http://a:1")]), None);
    }

    #[test]
    fn what_is_empty_or_of_no_use_leaves_it_to_the_next() {
        let variables = [
            ("ALL_PROXY", ""),
            ("https_proxy", "socks4://old:1080"),
            ("http_proxy", "me:secret@[2001:db8::2]:3128"),
        ];
        let named = "http://[2001:db8::2]:3128".to_owned();
        assert_eq!(used(&variables), Some(("http_proxy", named)));
        let only = |name: &str| (name == "all_proxy").then(|| "socks4://old:1080".to_owned());
        let environment = Environment::read(only);
        assert_eq!(environment.proxy, None);
        assert_eq!(
            environment.unusable,
            [("all_proxy", InvalidUpstream::Scheme)]
        );
    }
}
