use super::*;

mod diagnoses;
mod lost_answers;
mod reconnection;
