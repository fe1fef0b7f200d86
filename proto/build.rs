//! Generates the Rust side of the Varlink interfaces.

fn main() {
    for interface in [
        "src/org.cgtproxy.Helper.varlink",
        "src/org.cgtproxy.Agent.varlink",
        "src/org.cgtproxy.Relay.varlink",
    ] {
        varlink_generator::cargo_build(interface);
    }
}
