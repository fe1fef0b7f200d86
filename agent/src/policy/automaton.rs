//! A regular expression as an automaton: whether it matches a path, and what it says of paths that begin with one.

use std::cell::RefCell;

use regex_automata::hybrid::dfa::{Cache, DFA};
use regex_automata::nfa::thompson::pikevm::PikeVM;
use regex_automata::nfa::thompson::{self, BuildError, WhichCaptures};
use regex_automata::{Anchored, Input};
use regex_syntax::hir::Hir;

use super::Below;

/// How large one automaton may get, in bytes; also what those of its states may use that are built when they are
/// needed. The largest expressions that people write for applications take a tenth of it.
const AUTOMATON_BYTES: usize = 1 << 20;

/// Makes automata, one after the other. What it needs for it is larger than they are.
#[derive(Debug)]
pub(super) struct Compiler(thompson::Compiler);

impl Default for Compiler {
    fn default() -> Self {
        let mut compiler = thompson::Compiler::new();
        compiler.configure(
            thompson::Config::new()
                .utf8(false)
                .which_captures(WhichCaptures::None)
                .nfa_size_limit(Some(AUTOMATON_BYTES)),
        );
        Self(compiler)
    }
}

impl Compiler {
    /// The automaton of an expression.
    ///
    /// # Errors
    /// If it is too large.
    pub(super) fn compile(&self, hir: &Hir) -> Result<Automaton, Box<BuildError>> {
        let nfa = self.0.build_from_hir(hir).map_err(Box::new)?;
        let dfa = DFA::builder()
            .configure(
                DFA::config()
                    .unicode_word_boundary(true)
                    .cache_capacity(AUTOMATON_BYTES)
                    .skip_cache_capacity_check(true),
            )
            .build_from_nfa(nfa.clone());
        Ok(Automaton {
            lazy: dfa.ok().map(|dfa| {
                let cache = RefCell::new(dfa.create_cache());
                (dfa, cache)
            }),
            whole: PikeVM::new_from_nfa(nfa).map_err(Box::new)?,
        })
    }
}

/// What tells in one pass over a path whether an expression matches somewhere in it.
#[derive(Debug, Clone)]
pub(super) struct Automaton {
    /// A DFA, whose states are built when they are needed. It gives up where a byte that is not ASCII decides what a
    /// word is.
    lazy: Option<(DFA, RefCell<Cache>)>,
    /// Never gives up, and takes longer.
    whole: PikeVM,
}

impl Automaton {
    /// Whether there is a match somewhere in it.
    pub(super) fn matches(&self, path: &[u8]) -> bool {
        let input = Input::new(path).earliest(true);
        let lazy = self.lazy.as_ref().and_then(|(dfa, cache)| {
            let found = dfa.try_search_fwd(&mut cache.borrow_mut(), &input);
            found.ok().map(|found| found.is_some())
        });
        lazy.unwrap_or_else(|| self.whole.is_match(&mut self.whole.create_cache(), input))
    }

    /// Whether a match that begins where the path does is there already, or can't come any more, for paths that
    /// begin with this. None if it gives up on the way, or if it is still open.
    pub(super) fn follow(&self, beginning: &[u8]) -> Option<Below> {
        let (dfa, cache) = self.lazy.as_ref()?;
        let mut cache = cache.borrow_mut();
        let input = Input::new(beginning).anchored(Anchored::Yes);
        let mut state = dfa.start_state_forward(&mut cache, &input).ok()?;
        for &byte in beginning {
            state = dfa.next_state(&mut cache, state, byte).ok()?;
            if state.is_match() {
                // A match is seen one byte late, so that it has taken what follows it into account.
                return Some(Below::Everything);
            }
            if state.is_dead() {
                return Some(Below::Nothing);
            }
            if state.is_quit() {
                return None;
            }
        }
        None
    }
}
