//! What fails again and again is said once.

/// What was last said of something that may fail.
#[derive(Debug, Default)]
pub(crate) struct Said(Option<String>);

impl Said {
    /// Whether that is not what was said last. It is said now.
    pub(crate) fn is_news(&mut self, what: &str) -> bool {
        let news = self.0.as_deref() != Some(what);
        if news {
            self.0 = Some(what.to_owned());
        }
        news
    }

    /// It works: however it fails next is news. Returns whether it had failed.
    pub(crate) fn works(&mut self) -> bool {
        self.0.take().is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_is_no_news_until_it_has_worked() {
        let mut said = Said::default();
        assert!(said.is_news("a"));
        assert!(!said.is_news("a"));
        assert!(said.is_news("b"));
        assert!(said.is_news("a"));
        assert!(said.works());
        assert!(!said.works());
        assert!(said.is_news("a"));
    }
}
