//! `abi_stable`'s report of two layouts that differ, hundreds of lines long, in a few words.

/// The innermost difference of a report, such as `Entry.about: mismatched type, expected RString,
/// found u64`; empty if the report has another form than abi_stable 0.11's.
pub fn summary(report: &str) -> String {
    let Some((before, error)) = report.rsplit_once("Error:") else { return String::new() };
    let place = before.rsplit_once("inside:").map_or("", |(_, place)| place);
    // Only the path to the field; both layouts are spelled out after it.
    let path = place.split("Layout of expected type:").next().unwrap_or_default();
    let named = |key: &str| -> Vec<&str> {
        path.lines().filter_map(|line| line.trim().strip_prefix(key)).map(str::trim).collect()
    };
    let (fields, types) = (named("field_name:"), named("type:"));
    let words = error.split_whitespace().collect::<Vec<_>>().join(" ");
    let words = words.replace(" Expected: ", ", expected ").replace(" Found: ", ", found ");
    match (types.iter().rev().nth(1), fields.last()) {
        (Some(owner), Some(field)) => format!("{owner}.{field}: {words}"),
        (None, Some(field)) => format!("field `{field}`: {words}"),
        (_, None) => words,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use abi_stable::StableAbi;
    use abi_stable::abi_stability::abi_checking::check_layout_compatibility;

    mod host {
        use abi_stable::{StableAbi, std_types::RString};

        #[repr(C)]
        #[derive(StableAbi)]
        pub struct Row {
            pub name: RString,
            pub about: RString,
        }

        #[repr(C)]
        #[derive(StableAbi)]
        pub struct Table {
            pub row: Row,
        }
    }

    mod plugin {
        use abi_stable::{StableAbi, std_types::RString};

        #[repr(C)]
        #[derive(StableAbi)]
        pub struct Row {
            pub name: RString,
            pub about: u64,
        }

        #[repr(C)]
        #[derive(StableAbi)]
        pub struct Table {
            pub row: Row,
        }
    }

    #[test]
    fn the_innermost_difference_is_named() {
        let (host, plugin) = (host::Table::LAYOUT, plugin::Table::LAYOUT);
        let report = check_layout_compatibility(host, plugin).unwrap_err().to_string();
        assert!(report.lines().count() > 50);
        let says = "Row.about: mismatched type, expected RString, found u64";
        assert_eq!(summary(&report), says);
        let (host, plugin) = (host::Row::LAYOUT, plugin::Row::LAYOUT);
        let report = check_layout_compatibility(host, plugin).unwrap_err().to_string();
        let says = "field `about`: mismatched type, expected RString, found u64";
        assert_eq!(summary(&report), says);
        let report = check_layout_compatibility(u32::LAYOUT, u64::LAYOUT).unwrap_err().to_string();
        assert_eq!(summary(&report), "mismatched type, expected u32, found u64");
        assert_eq!(summary("something else"), "");
    }
}
