//! Sizes that both sides know, so that an agent can refuse by itself what the helper would refuse.
//! How many of a thing one user may have is the administrator's choice and lives in the helper.

/// The longest message in bytes, without its final NUL. 16,000 assignments with long names fit.
pub const MESSAGE_BYTES: usize = 4 * 1024 * 1024;

/// The longest control group path in bytes: `PATH_MAX` without its NUL (linux/limits.h).
pub const PATH_BYTES: usize = 4095;

/// The longest name of one control group in bytes: `NAME_MAX` (linux/limits.h).
pub const COMPONENT_BYTES: usize = 255;

/// The longest name of a proxy in bytes. Chain names that carry it stay below `NFT_NAME_MAXLEN`
/// (linux/netfilter/nf_tables.h), slice names below systemd's `UNIT_NAME_MAX`.
pub const PROXY_NAME_BYTES: usize = 64;
