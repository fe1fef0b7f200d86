//! Applications that have no control group of their own, because whoever started them did not make one.

use std::collections::BTreeSet;
use std::io::{self, Write};

use super::{Running, processes, unit};
use crate::otherwise::Otherwise;
use crate::policy::Names;
use crate::subtree::{Subtree, is_session};
use crate::text::printable;

/// Units of desktops and window managers, and those that terminals make for what is typed into them. What
/// runs in them besides was started as a plain child.
const SHARING: &str = "
    org.gnome.Shell@*.service gnome-shell*.service gnome-session*.service gnome-flashback*.service
    plasma-*.service dde-*.service org.dde.*.service cosmic-*.service xfce4-*.service
    wayland-wm@*.service niri.service sway*.service hyprland*.service i3*.service labwc*.service
    river*.service wayfire*.service
    vte-spawn-*.scope ptyxis-spawn-*.scope
";

/// Executables of terminals, whose units are shared too.
const TERMINALS: &str = "
    konsole yakuake gnome-terminal* kgx ptyxis* xterm uxterm urxvt* rxvt* alacritty kitty foot wezterm*
    ghostty xfce4-terminal tilix lxterminal qterminal st deepin-terminal cosmic-term
";

/// What belongs to a desktop or to a login: executables of which nobody means the traffic.
const PARTS: &str = "
    gnome-shell* gnome-session* gnome-keyring* gsd-* mutter* gjs* ibus-* gvfs*
    plasma* kwin* ksmserver* krunner* kded* kactivitymanagerd* startplasma* kwalletd* xembedsniproxy
    gmenudbusmenuproxy org_kde_* dde-* deepin-* startdde treeland* cosmic-*
    xfce4-* xfwm4 xfdesktop xfsettingsd xfconfd mate-* marco cinnamon* nemo-desktop lxqt-* lxsession
    openbox fluxbox icewm* awesome bspwm sxhkd dwm qtile xmonad* i3* sway* Hyprland hypr* niri* river*
    labwc wayfire waybar polybar picom dunst mako uwsm*
    Xorg X Xwayland* xinit startx xwayland-satellite xdg-* at-spi* dconf-service
    login sshd* systemd* (sd-* gdm* sddm* lightdm* greetd* tuigreet agetty ly pam*
    dbus-* ssh-agent gpg-agent su sudo* setpriv
    bash zsh fish sh dash nu tmux* screen* script cgtproxy-agent cgtproxy-exec
";

/// Programs that share a control group.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) unit: String,
    /// Whether rules can be about it at all.
    pub(super) in_reach: bool,
    pub(super) executables: BTreeSet<String>,
}

/// Finds them in the units of desktops and terminals, and in the login sessions beside the user's service manager.
pub(super) fn find(subtree: &Subtree, running: &[Running]) -> Vec<Shared> {
    let (sharing, terminals, parts) = (names(SHARING), names(TERMINALS), names(PARTS));
    let is_terminal = |name: &String| terminals.matches(name.as_bytes());
    let foreign = |mut executables: BTreeSet<String>| -> BTreeSet<String> {
        executables.retain(|name| !parts.matches(name.as_bytes()));
        executables
    };
    let in_reach = running.iter().filter_map(|r| {
        let unit = unit(r);
        let mut executables = foreign(r.executables.clone());
        let is_shared = is_session(&unit)
            || sharing.matches(unit.as_bytes())
            || r.executables.iter().any(is_terminal);
        executables.retain(|name| !is_terminal(name));
        is_shared.then_some(Shared {
            unit,
            in_reach: true,
            executables,
        })
    });
    let sessions = subtree
        .sessions()
        .into_iter()
        .map(|(unit, directory)| Shared {
            unit,
            in_reach: false,
            executables: foreign(processes::executables(&directory)),
        });
    sessions
        .chain(in_reach)
        .filter(|shared| !shared.executables.is_empty())
        .collect()
}

/// Names between white space.
fn names(list: &str) -> Names {
    Names::new(list.split_whitespace().map(str::to_owned).collect())
}

/// Says what shares a control group, and what to do.
pub(super) fn print(
    out: &mut impl Write,
    shared: &[Shared],
    otherwise: &Otherwise,
) -> io::Result<()> {
    if shared.is_empty() {
        return Ok(());
    }
    writeln!(
        out,
        "\nWithout a control group of their own, so that no rule can tell them apart:"
    )?;
    for shared in shared {
        let names: Vec<_> = shared.executables.iter().map(|n| printable(n)).collect();
        writeln!(out, "  {}: {}", printable(&shared.unit), names.join(", "))?;
    }
    if shared.iter().any(|shared| !shared.in_reach) {
        writeln!(
            out,
            "A login session (session-*.scope) is out of reach of your rules altogether: it {}.",
            otherwise.goes()
        )?;
    }
    writeln!(
        out,
        "Start such programs so that each gets one:\n  \
         cgtproxy-exec TARGET COMMAND           under a target, whatever the rules say\n  \
         uwsm app -- COMMAND, app2unit COMMAND  as an application, from a launcher or a key binding\n  \
         systemd-run --user --scope --unit=app-ID-$$.scope COMMAND\n                                         \
         as the application ID, with nothing but systemd"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_a_desktop_from_what_it_has_started() {
        let parts = names(PARTS);
        for name in [
            "gnome-shell",
            "i3",
            "i3bar",
            "Xorg",
            "bash",
            "sshd-session",
            "(sd-pam)",
            "Hyprland",
        ] {
            assert!(parts.matches(name.as_bytes()), "{name}");
        }
        for name in [
            "firefox",
            "telegram-desktop",
            "curl",
            "steam",
            "mihomo",
            "chrome",
        ] {
            assert!(!parts.matches(name.as_bytes()), "{name}");
        }
    }
}
