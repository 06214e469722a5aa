//! Arguments of a launch, with all that can be checked about them.

use super::kernel::Kernel;
use super::memory::{DeviceBuffer, DeviceSlice};
use super::tensor_map::Encoded;
use super::{Error, Plain, Result};
use std::marker::PhantomData;

/// What a number, or what a pointer points to, is; numbered as in emulation/table.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Type {
    /// None of the others: a pointer to it takes all.
    Any = 0,
    Bf16 = 1,
    F32 = 2,
    I32 = 3,
    U32 = 4,
    I64 = 5,
    U64 = 6,
    U8 = 7,
    F64 = 8,
    TensorMap = 9,
}

impl Type {
    pub(super) fn of_number(number: u8) -> Self {
        let all = [
            Self::Bf16,
            Self::F32,
            Self::I32,
            Self::U32,
            Self::I64,
            Self::U64,
            Self::U8,
            Self::F64,
            Self::TensorMap,
        ];
        all.into_iter().find(|t| *t as u8 == number).unwrap_or(Self::Any)
    }
}

/// What a kernel's parameter is, as far as its compiler tells.
#[derive(Clone, Copy, Debug)]
pub(super) struct Parameter {
    pub size: usize,
    /// Pointer or number, of which type, and whether it is written through; the driver does not know.
    pub details: Option<(bool, Type, bool)>,
}

/// The arguments of a launch, in the order of the kernel's parameters: see [`args!`](crate::args).
#[derive(Default)]
pub struct Args<'a> {
    pub(super) list: Vec<Arg>,
    borrowed: PhantomData<&'a ()>,
}

/// One argument.
#[doc(hidden)]
#[derive(Clone, Copy, Debug)]
pub struct Arg {
    /// As the kernel reads it.
    pub(super) bytes: Bytes,
    pub(super) size: usize,
    pub(super) pointer: bool,
    pub(super) writable: bool,
    pub(super) of: Type,
    /// Of the memory that it leads to, or 0.
    pub(super) address: u64,
}

/// Of an argument, aligned as the largest is.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(super) struct Bytes([u8; 128]);

impl Bytes {
    fn of(value: &[u8]) -> Self {
        let mut bytes = [0; 128];
        bytes[..value.len()].copy_from_slice(value);
        Self(bytes)
    }

    pub fn as_ptr(&self) -> *const u8 {
        self.0.as_ptr()
    }
}

impl Arg {
    pub(super) fn map(encoded: Encoded, address: u64, writable: bool) -> Self {
        let words = encoded.0.map(u64::to_ne_bytes);
        let bytes = Bytes::of(words.as_flattened());
        Self { bytes, size: 128, pointer: false, writable, of: Type::TensorMap, address }
    }
}

/// What can be passed to a kernel: slices of a device's memory, numbers, and an `Option` of either, where
/// `None` is a null pointer.
pub trait Argument<'a> {
    #[doc(hidden)]
    fn arg(self) -> Arg;
}

/// The arguments of a launch: `args![x, &mut y, rows as i32, eps]`.
#[macro_export]
macro_rules! args {
    ($($argument:expr),* $(,)?) => {
        $crate::cuda::Args::default()$(.with($argument))*
    };
}

impl<'a> Args<'a> {
    /// With one more.
    #[must_use]
    pub fn with(mut self, argument: impl Argument<'a>) -> Self {
        self.list.push(argument.arg());
        self
    }

    /// With others behind them.
    #[must_use]
    pub fn and(mut self, others: Args<'a>) -> Self {
        self.list.extend(others.list);
        self
    }

    /// Refuses arguments that do not fit the kernel's parameters.
    pub(super) fn check(&self, kernel: &Kernel, parameters: &[Parameter]) -> Result<()> {
        let refuse = |what: String| Err(Error::Failed(format!("kernel {}: {what}", kernel.name)));
        if self.list.len() != parameters.len() {
            let (given, taken) = (self.list.len(), parameters.len());
            return refuse(format!("{given} arguments for {taken} parameters"));
        }
        for (number, (arg, parameter)) in self.list.iter().zip(parameters).enumerate() {
            if arg.size != parameter.size {
                let (given, taken) = (arg.size, parameter.size);
                return refuse(format!(
                    "argument {number} has {given} bytes, its parameter {taken}"
                ));
            }
            let Some((pointer, of, writable)) = parameter.details else { continue };
            let same_type = arg.of == of || (pointer && of == Type::Any);
            if arg.pointer != pointer || !same_type {
                let kind = |pointer| if pointer { "a pointer to " } else { "" };
                let given = format!("{}{:?}", kind(arg.pointer), arg.of);
                let taken = format!("{}{of:?}", kind(pointer));
                return refuse(format!("argument {number} is {given}, its parameter {taken}"));
            }
            if writable && !arg.writable {
                return refuse(format!(
                    "argument {number} is written, so it must be borrowed as &mut"
                ));
            }
        }
        Ok(())
    }
}

fn pointer<T: Plain>(address: u64, writable: bool) -> Arg {
    let bytes = Bytes::of(&address.to_ne_bytes());
    Arg { bytes, size: 8, pointer: true, writable, of: T::TYPE, address }
}

impl<'a, T: Plain> Argument<'a> for &'a DeviceSlice<T> {
    fn arg(self) -> Arg {
        pointer::<T>(self.address(), false)
    }
}

impl<'a, T: Plain> Argument<'a> for &'a mut DeviceSlice<T> {
    fn arg(self) -> Arg {
        pointer::<T>(self.address(), true)
    }
}

impl<'a, T: Plain> Argument<'a> for &'a DeviceBuffer<T> {
    fn arg(self) -> Arg {
        (&**self).arg()
    }
}

impl<'a, T: Plain> Argument<'a> for &'a mut DeviceBuffer<T> {
    fn arg(self) -> Arg {
        (&mut **self).arg()
    }
}

impl<'a, T: Plain> Argument<'a> for Option<&'a DeviceSlice<T>> {
    fn arg(self) -> Arg {
        self.map_or(pointer::<T>(0, false), Argument::arg)
    }
}

impl<'a, T: Plain> Argument<'a> for Option<&'a mut DeviceSlice<T>> {
    fn arg(self) -> Arg {
        self.map_or(pointer::<T>(0, true), Argument::arg)
    }
}

/// A struct of numbers with four bytes each, by their bits.
impl<'a, const N: usize> Argument<'a> for [u32; N] {
    fn arg(self) -> Arg {
        let words = self.map(u32::to_ne_bytes);
        let bytes = Bytes::of(words.as_flattened());
        Arg { bytes, size: 4 * N, pointer: false, writable: false, of: Type::Any, address: 0 }
    }
}

macro_rules! number {
    ($($t:ty => $name:ident),*) => {$(
        impl<'a> Argument<'a> for $t {
            fn arg(self) -> Arg {
                let bytes = Bytes::of(&self.to_ne_bytes());
                let (size, of) = (size_of::<$t>(), Type::$name);
                Arg { bytes, size, pointer: false, writable: false, of, address: 0 }
            }
        }
    )*};
}
number!(f32 => F32, i32 => I32, u32 => U32, i64 => I64, u64 => U64, usize => U64);
