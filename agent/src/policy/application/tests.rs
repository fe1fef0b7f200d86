//! Names of units as launchers write them.

use proptest::prelude::*;

use super::*;

/// Who wrote it or where it was seen; the unit; its ids.
type Case = (&'static str, &'static str, &'static [&'static str]);

const CASES: &[Case] = &[
    // The examples of the convention itself.
    (
        "systemd.io",
        "app-gnome-org.gnome.Evince@12345.service",
        &["org.gnome.Evince", "gnome-org.gnome.Evince"],
    ),
    (
        "systemd.io",
        "app-flatpak-org.telegram.desktop@12345.service",
        &["org.telegram.desktop", "flatpak-org.telegram.desktop"],
    ),
    (
        "systemd.io",
        "app-KDE-org.kde.okular@12345.service",
        &["org.kde.okular", "KDE-org.kde.okular"],
    ),
    (
        "systemd.io",
        "app-org.kde.amarok.service",
        &["org.kde.amarok"],
    ),
    (
        "systemd.io",
        "app-org.gnome.Evince-12345.scope",
        &["org.gnome.Evince"],
    ),
    // GNOME: app-gnome-%s-%d.scope, escaped (gnome-shell, libgnome-desktop).
    (
        "gnome-shell",
        r"app-gnome-google\x2dchrome-99.scope",
        &["google-chrome", "gnome-google-chrome"],
    ),
    (
        "gnome-session",
        r"app-gnome-org.gnome.Evolution\x2dalarm\x2dnotify-2437.scope",
        &[
            "org.gnome.Evolution-alarm-notify",
            "gnome-org.gnome.Evolution-alarm-notify",
        ],
    ),
    (
        "gnome-session",
        r"app-gnome-at\x2dspi\x2ddbus\x2dbus-717.scope",
        &["at-spi-dbus-bus", "gnome-at-spi-dbus-bus"],
    ),
    (
        "gnome-terminal",
        "app-org.gnome.Terminal.slice",
        &["org.gnome.Terminal"],
    ),
    // KDE: app-%1-%2.scope and app-%1@%2.service with a UUID without dashes, escaped (KIO).
    (
        "kio",
        r"app-google\x2dchrome@51f94eb073924ad1a30a08b2f1314900.service",
        &["google-chrome"],
    ),
    (
        "kio",
        "app-org.kde.konsole@58166e96f84e44d3a9cf9b573621dc19.service",
        &["org.kde.konsole"],
    ),
    (
        "kio",
        r"app-google\x2dchrome-6f28379714104c16b90afd1fb3f598d0.scope",
        &["google-chrome"],
    ),
    // Not escaped: konsole, browsers and others name themselves, app-%1-PID.scope.
    (
        "konsole",
        "app-org.kde.konsole-4514.scope",
        &["org.kde.konsole"],
    ),
    (
        "chromium",
        "app-org.chromium.Chromium-5237.scope",
        &["org.chromium.Chromium"],
    ),
    ("vscode", "app-code-3579042.scope", &["code"]),
    (
        "mozillavpn",
        "app-org.mozilla.vpn-321.scope",
        &["org.mozilla.vpn"],
    ),
    (
        "unescaped",
        "app-google-chrome-4242.scope",
        &["chrome", "google-chrome"],
    ),
    (
        "unescaped",
        "app-com.foo.bar-baz-1.scope",
        &["com.foo.bar-baz"],
    ),
    ("unescaped", "app-a-b-c@1.service", &["b-c", "a-b-c"]),
    // systemd-xdg-autostart-generator: app-ID@autostart.service, escaped.
    (
        "autostart",
        r"app-nm\x2dapplet@autostart.service",
        &["nm-applet"],
    ),
    (
        "autostart",
        "app-org.keepassxc.KeePassXC@autostart.service",
        &["org.keepassxc.KeePassXC"],
    ),
    // dde-application-manager, and its predecessor's scopes, which are not escaped.
    (
        "dde",
        "app-DDE-org.deepin.browser@0a1b2c.service",
        &["org.deepin.browser", "DDE-org.deepin.browser"],
    ),
    (
        "dde",
        r"app-DDE-deepin\x2dmusic@0a1b2c.service",
        &["deepin-music", "DDE-deepin-music"],
    ),
    (
        "startdde",
        "app-dde-dde-file-manager-812.scope",
        &["dde-file-manager", "dde-dde-file-manager"],
    ),
    // flatpak-run: app-flatpak-%s-%d.scope, escaped.
    (
        "flatpak",
        "app-flatpak-org.telegram.desktop-2268265498.scope",
        &["org.telegram.desktop", "flatpak-org.telegram.desktop"],
    ),
    (
        "flatpak",
        r"app-flatpak-io.github.some\x2dapp-7.scope",
        &["io.github.some-app", "flatpak-io.github.some-app"],
    ),
    // snapd: snap.SNAP.APP-UUID.scope, with a dot before 2.60; services; hooks.
    (
        "snapd",
        "snap.firefox.firefox-8d3f1834-c397-4085-b29d-3b2538c9ff4e.scope",
        &["firefox", "firefox.firefox", "firefox_firefox"],
    ),
    (
        "snapd",
        "snap.firefox.firefox.7d9b4142-0288-47c3-a5f6-ab77b8803604.scope",
        &["firefox", "firefox.firefox", "firefox_firefox"],
    ),
    (
        "snapd",
        "snap.telegram-desktop.telegram-desktop-8d3f1834-c397-4085-b29d-3b2538c9ff4e.scope",
        &[
            "telegram-desktop",
            "telegram-desktop.telegram-desktop",
            "telegram-desktop_telegram-desktop",
        ],
    ),
    (
        "snapd",
        "snap.chromium.daemon.service",
        &["chromium.daemon", "chromium_daemon", "chromium"],
    ),
    (
        "snapd",
        "snap.lxd.hook.install-8d3f1834-c397-4085-b29d-3b2538c9ff4e.scope",
        &["lxd.install", "lxd_install", "lxd"],
    ),
    // uwsm, app2unit, niri, COSMIC.
    (
        "uwsm",
        "app-Hyprland-steam-031bdc27.scope",
        &["steam", "Hyprland-steam"],
    ),
    (
        "uwsm",
        r"app-Hyprland-xdg\x2dterminal\x2dexec-4c0069b2.scope",
        &["xdg-terminal-exec", "Hyprland-xdg-terminal-exec"],
    ),
    (
        "uwsm",
        "app-Hyprland-udiskie@99aa.service",
        &["udiskie", "Hyprland-udiskie"],
    ),
    ("uwsm", "app-graphical.slice", &[]),
    (
        "niri",
        "app-niri-kitty-4242.scope",
        &["kitty", "niri-kitty"],
    ),
    ("niri", "app-niri-foot.scope", &["foot", "niri-foot"]),
    (
        "cosmic",
        "app-cosmic-com.system76.CosmicAppList-36675.scope",
        &[
            "com.system76.CosmicAppList",
            "cosmic-com.system76.CosmicAppList",
        ],
    ),
    // dbus-broker.
    (
        "dbus-broker",
        r"app-dbus\x2d:1.4\x2dorg.gnome.Geary.slice",
        &["org.gnome.Geary"],
    ),
    (
        "dbus-broker",
        "dbus-:1.2-org.gnome.Nautilus@0.service",
        &["org.gnome.Nautilus"],
    ),
    // Units of no application.
    ("systemd", "app.slice", &[]),
    ("systemd", "session-3.scope", &[]),
    ("systemd", "run-u22.service", &[]),
    (
        "vte",
        "vte-spawn-2c4a7f5e-3b1d-4e8a-9f6c-0d1e2f3a4b5c.scope",
        &[],
    ),
    ("gnome-terminal", "gnome-terminal-server.service", &[]),
    ("gnome", "app-gnome.slice", &[]),
    ("konsole", "tab(4529).scope", &[]),
    ("nobody", "app-.scope", &[]),
    ("nobody", "snap.x.scope", &[]),
    ("nobody", "app-foo.timer", &[]),
];

#[test]
fn knows_the_units_of_launchers() {
    for (who, unit, ids) in CASES {
        assert_eq!(application_ids(unit.as_bytes()), *ids, "{who}: {unit}");
    }
}

#[test]
fn unescapes_what_systemd_escapes() {
    for (name, plain) in [
        (r"a\x2db", "a-b"),
        (r"\xc3\xa4", "ä"),
        (r"\x", r"\x"),
        (r"\x2", r"\x2"),
        (r"\x+1", r"\x+1"),
        (r"a\y\x2d\xzz", r"a\y-\xzz"),
    ] {
        assert_eq!(unescape(name), plain);
    }
}

/// As systemd-escape(1) does.
fn escape(id: &str) -> String {
    id.bytes()
        .map(|b| match b {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b':' | b'_' | b'.' => char::from(b).into(),
            _ => format!(r"\x{b:02x}"),
        })
        .collect()
}

proptest! {
    #[test]
    #[cfg_attr(miri, ignore = "texts that are made of a pattern take minutes")]
    fn what_was_escaped_is_found(id in "[a-zA-Z][a-zA-Z0-9.ä -]{0,12}", launcher in "(gnome-|KDE-|Foo-)?", random in "[0-9a-f]{1,32}") {
        let name = escape(&id);
        for unit in [
            format!("app-{launcher}{name}-{random}.scope"),
            format!("app-{launcher}{name}@{random}.service"),
            format!("app-{launcher}{name}@autostart.service"),
        ] {
            let ids = application_ids(unit.as_bytes());
            let known = LAUNCHERS.contains(&id.as_str());
            prop_assert!(known || ids.first() == Some(&id), "{unit}: {ids:?}");
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "texts that are made of a pattern take minutes")]
    fn no_name_breaks_it(unit in proptest::collection::vec(any::<u8>(), 0..80), text in "(app-|snap\\.|dbus-|-|@|\\.|\\\\x|é|[a-f0-9]{4,12}){0,9}\\.(scope|service|slice)") {
        let _ = application_ids(&unit);
        let _ = application_ids(text.as_bytes());
    }
}
