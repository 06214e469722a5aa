//! The memory that the machine has and that this process uses. Linux says it in files; elsewhere
//! nothing is known, and nothing is refused.

use std::path::Path;

/// Memory of this process in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resident {
    pub now: u64,
    /// Most so far.
    pub peak: u64,
}

/// What this process uses.
pub fn resident() -> Resident {
    let status = read("/proc/self/status").unwrap_or_default();
    let field = |name| kilobytes(&status, name).unwrap_or(0);
    Resident { now: field("VmRSS:"), peak: field("VmHWM:") }
}

/// What this process can have in all, what it uses already included: the kernel's MemAvailable, or
/// what the strictest control group has left, whichever is lower.
pub fn available() -> Option<u64> {
    let own = resident().now;
    let free = kilobytes(&read("/proc/meminfo")?, "MemAvailable:")?;
    let groups = read("/proc/self/cgroup").unwrap_or_default();
    let left = groups.lines().flat_map(|line| left_in_group(line, Path::new("/sys/fs/cgroup")));
    Some(left.chain([free]).min()? + own)
}

/// What a control group and those around it have left, from one line of /proc/self/cgroup: the limit less
/// what its processes use. Pages of files count as free: the kernel drops them when they are needed.
fn left_in_group(line: &str, mount: &Path) -> Vec<u64> {
    let mut parts = line.splitn(3, ':');
    let (_, Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
        return Vec::new();
    };
    let (folder, limit, used) = match controllers {
        "" => (mount.to_owned(), "memory.max", "anon"),
        list if list.split(',').any(|name| name == "memory") => {
            (mount.join("memory"), "memory.limit_in_bytes", "total_rss")
        }
        _ => return Vec::new(),
    };
    let path = Path::new(path.trim_start_matches('/'));
    let left = |group: &Path| {
        let group = folder.join(group);
        // "max" is no limit.
        let limit: u64 = read(group.join(limit))?.trim().parse().ok()?;
        let statistics = read(group.join("memory.stat")).unwrap_or_default();
        let used = statistics.lines().find_map(|line| {
            let (name, bytes) = line.split_once(' ')?;
            (name == used).then(|| bytes.trim().parse::<u64>().ok())?
        });
        Some(limit.saturating_sub(used.unwrap_or(0)))
    };
    path.ancestors().filter_map(left).collect()
}

/// Bytes as people read them.
pub fn in_mebibytes(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// As [`in_mebibytes`], with the unit.
pub fn mebibytes(bytes: usize) -> String {
    format!("{:.1} MiB", in_mebibytes(bytes))
}

fn read(path: impl AsRef<Path>) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

/// The number of a line `name   123 kB`, in bytes.
fn kilobytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let number: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(number << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn this_process_uses_some_of_what_there_is() {
        let resident = resident();
        assert!(resident.now > 1 << 20 && resident.peak >= resident.now / 2, "{resident:?}");
        assert!(available().unwrap() > resident.now);
    }

    #[test]
    fn the_strictest_group_counts() {
        let dir = std::env::temp_dir().join(format!("uft-cgroup-{}", std::process::id()));
        let write = |path: &str, text: &str| {
            let path = dir.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("a/memory.max", "1000\n");
        write("a/memory.stat", "file 800\nanon 300\n");
        write("a/b/memory.max", "max\n");
        write("memory/job/memory.limit_in_bytes", "500\n");
        write("memory/job/memory.stat", "rss 1\ntotal_rss 50\n");
        assert_eq!(left_in_group("0::/a/b", &dir), [700]);
        assert_eq!(left_in_group("4:cpu,memory:/job", &dir), [450]);
        assert!(left_in_group("5:cpu:/job", &dir).is_empty());
        assert!(left_in_group("0::/elsewhere", &dir).is_empty());
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_line_of_the_kernel_is_read() {
        let text = "MemTotal:  9 kB\nMemAvailable:     2048 kB\n";
        assert_eq!(kilobytes(text, "MemAvailable:"), Some(2 << 20));
        assert_eq!(kilobytes(text, "Swap:"), None);
    }
}
