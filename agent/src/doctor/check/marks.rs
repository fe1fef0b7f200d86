//! Do others use the bits of packet marks that are ours?

use crate::doctor::facts::{Facts, Rule};
use crate::doctor::{Finding, Group};

const OTHER_MASK: &str = "change the other program's marks, or set mark-mask in /etc/cgtproxy/helper.yaml to \
                          bits that nobody else uses";
/// What is removed is what the configuration names, so it is removed before that changes.
const STOP: &str = "sudo systemctl stop cgtproxy-helper.socket cgtproxy-helper.service";
const START: &str = "sudo systemctl start cgtproxy-helper.socket";

pub(super) fn check(facts: &Facts) -> Group {
    let mut group = Group::new("marks");
    let diagnosis = match facts.diagnosis() {
        Ok(diagnosis) => diagnosis,
        Err(why) => {
            group
                .unseen
                .push(format!("whether others use the same bits: {why}"));
            return group;
        }
    };
    let mask = u32::try_from(diagnosis.markMask).unwrap_or_default();
    let table = u32::try_from(diagnosis.routeTable).unwrap_or_default();
    group.summary = format!("nobody else uses {mask:#010x}");
    if let Some(rules) = group.see("routing rules", &facts.rules) {
        group.found(rules.iter().filter_map(|rule| by_rule(rule, mask, table)));
    }
    match &diagnosis.markWriters {
        Some(writers) => group.found(writers.iter().map(|writer| {
            Finding::warning(
                "marks-changed",
                format!(
                    "rules in the nftables table '{}' change bits {:#010x} of marks, which are cgtproxy's",
                    writer.table, writer.bits
                ),
            )
            .effect(
                "Packets that these rules meet lose their way to the proxy and leave directly, or reach \
                 nobody.",
            )
            .advice(format!("{OTHER_MASK} (stop the helper before, start it after)"))
            .command(format!("sudo nft list table {}", writer.table))
            .command(STOP)
            .command(START)
        })),
        None => group
            .unseen
            .push("marks in the ruleset: the helper could not read it, or it has too many rules".to_owned()),
    }
    group
}

/// A routing rule of another program that expects bits of ours to be set.
fn by_rule(rule: &Rule, mask: u32, table: u32) -> Option<Finding> {
    let (value, of) = rule.mark?;
    let bits = value & of & mask;
    (bits != 0 && rule.table != Some(table)).then(|| {
        Finding::warning(
            "marks-in-rule",
            format!(
                "the {} routing rule {} looks for the mark {value:#x}/{of:#x}; the bits {bits:#010x} of it \
                 are cgtproxy's",
                rule.family, rule.priority
            ),
        )
        .effect(
            "Another program marks packets with these bits. They may be taken for diverted ones and reach \
             nobody, and yours may be routed by its rule.",
        )
        .advice(format!("{OTHER_MASK} (stop the helper before, start it after)"))
        .command(STOP)
        .command(START)
    })
}
