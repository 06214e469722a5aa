//! The generic door: what a later revision of the interface adds, reached by name and revision.
//!
//! `abi_stable` lets an old host take a newer plugin but never a newer host an older plugin, so
//! the types of this crate are frozen within an ABI revision. Whatever comes later – another
//! constructor, another trait – is an extension: a static value of any [`StableAbi`] type that
//! [`PluginModule::query`](crate::abi::PluginModule) hands out and whose layout is checked when it
//! is opened. A plugin that does not know a name answers with none.

use crate::mismatch;
use abi_stable::{
    StableAbi, abi_stability::abi_checking::check_layout_compatibility, type_layout::TypeLayout,
};

/// A static value with its type's layout.
#[repr(C)]
#[derive(StableAbi, Clone, Copy)]
pub struct Extension {
    layout: &'static TypeLayout,
    value: *const (),
}

// SAFETY: `of` takes the value from a `&'static T` with `T: Sync`.
unsafe impl Send for Extension {}
// SAFETY: as above.
unsafe impl Sync for Extension {}

impl Extension {
    /// A value with its type's layout.
    pub fn of<T: StableAbi + Sync>(value: &'static T) -> Self {
        Self { layout: T::LAYOUT, value: std::ptr::from_ref(value).cast() }
    }

    /// The value, if it has the layout of `T`.
    ///
    /// # Errors
    /// What differs between the two layouts, in a few words.
    pub fn open<T: StableAbi>(&self) -> Result<&'static T, String> {
        check_layout_compatibility(T::LAYOUT, self.layout)
            .map_err(|errors| mismatch::summary(&errors.to_string()))?;
        // SAFETY: made by `of` from a `&'static` value whose layout was just compared with T's.
        Ok(unsafe { &*self.value.cast::<T>() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(C)]
    #[derive(StableAbi)]
    struct Twice {
        call: extern "C" fn(u32) -> u32,
    }

    extern "C" fn twice(x: u32) -> u32 {
        2 * x
    }

    static TWICE: Twice = Twice { call: twice };

    #[test]
    fn opens_as_what_it_is_and_as_nothing_else() {
        let door = Extension::of(&TWICE);
        assert_eq!((door.open::<Twice>().unwrap().call)(21), 42);
        assert!(door.open::<u64>().is_err());
    }
}
