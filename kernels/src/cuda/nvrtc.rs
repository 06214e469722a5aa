//! NVRTC, the compiler that comes as a library: finding it, and making a cubin of a kernel's source.
//!
//! Opened by path, so that it may lie anywhere; its second library, which it opens by name, is opened
//! before it.

use super::kernel::Module;
use super::{Error, Result, cache};
use libloading::Library;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

const REMEDY: &str =
    "install it with `pip install nvidia-cuda-nvrtc==13.0.88`, or set UFT_NVRTC to its folder";

type Program = *mut c_void;

/// The functions of NVRTC that are used; a result other than 0 is an error.
pub struct Nvrtc {
    /// The library's file, or its name where the system's search found it.
    pub path: PathBuf,
    /// Major and minor.
    pub version: (i32, i32),
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int,
    destroy: unsafe extern "C" fn(*mut Program) -> c_int,
    log_size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    log: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    cubin_size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    cubin: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    message: unsafe extern "C" fn(c_int) -> *const c_char,
}

/// What came of a source.
pub struct Compiled {
    pub cubin: Vec<u8>,
    /// The compiler's, with the assembler's report of registers and spills.
    #[cfg_attr(not(test), expect(dead_code, reason = "what tests check registers by"))]
    pub log: String,
}

impl Nvrtc {
    /// The library, searched for once.
    ///
    /// # Errors
    /// It is not found, or cannot be used.
    pub fn find() -> Result<&'static Self> {
        static FOUND: OnceLock<Result<Nvrtc>> = OnceLock::new();
        FOUND.get_or_init(Self::search).as_ref().map_err(Clone::clone)
    }

    fn search() -> Result<Self> {
        if let Some(named) = std::env::var_os("UFT_NVRTC").map(PathBuf::from) {
            let files = if named.is_dir() { libraries_in(&named) } else { vec![named.clone()] };
            return files.iter().find_map(|file| Self::open(file).ok()).ok_or_else(|| {
                let named = named.display();
                Error::Missing(format!(
                    "UFT_NVRTC: {named} is not, and does not hold, libnvrtc.so.12 or .13"
                ))
            });
        }
        let toolkits = ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(std::env::var_os);
        let toolkits = toolkits.map(PathBuf::from).chain([PathBuf::from("/usr/local/cuda")]);
        let in_toolkits = toolkits
            .flat_map(|root| ["lib64", "lib", "targets/x86_64-linux/lib"].map(|sub| root.join(sub)))
            .flat_map(|folder| libraries_in(&folder));
        let by_name = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"].map(PathBuf::from);
        // Python is asked last: it takes a moment.
        let wheels = std::iter::once_with(site_packages)
            .flatten()
            .flat_map(|site| ["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib"].map(|sub| site.join(sub)))
            .flat_map(|folder| libraries_in(&folder));
        in_toolkits.chain(by_name).chain(wheels).find_map(|file| Self::open(&file).ok()).ok_or_else(
            || Error::Missing(format!("NVRTC, which compiles the kernels, is not found: {REMEDY}")),
        )
    }

    fn open(path: &Path) -> Result<Self> {
        let failed = |e: libloading::Error| Error::Missing(format!("{}: {e}", path.display()));
        if let Some(folder) = path.parent().filter(|folder| folder.is_absolute()) {
            for file in files(folder, "libnvrtc-builtins.so") {
                // SAFETY: NVIDIA's library, which runs nothing of note when it is loaded.
                if let Ok(builtins) = unsafe { Library::new(file) } {
                    std::mem::forget(builtins);
                    break;
                }
            }
        }
        // SAFETY: as above; it stays open as long as the process, for its functions are kept.
        let library = unsafe { Library::new(path) }.map_err(failed)?;
        // SAFETY: the signatures are those of nvrtc.h.
        let found = unsafe {
            let version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int =
                *library.get(b"nvrtcVersion").map_err(failed)?;
            let (mut major, mut minor) = (0, 0);
            version(&raw mut major, &raw mut minor);
            Self {
                path: path.to_owned(),
                version: (major, minor),
                create: *library.get(b"nvrtcCreateProgram").map_err(failed)?,
                compile: *library.get(b"nvrtcCompileProgram").map_err(failed)?,
                destroy: *library.get(b"nvrtcDestroyProgram").map_err(failed)?,
                log_size: *library.get(b"nvrtcGetProgramLogSize").map_err(failed)?,
                log: *library.get(b"nvrtcGetProgramLog").map_err(failed)?,
                cubin_size: *library.get(b"nvrtcGetCUBINSize").map_err(failed)?,
                cubin: *library.get(b"nvrtcGetCUBIN").map_err(failed)?,
                message: *library.get(b"nvrtcGetErrorString").map_err(failed)?,
            }
        };
        std::mem::forget(library);
        if found.version.0 < 12 {
            let (major, minor) = found.version;
            return Err(Error::Missing(format!("NVRTC {major}.{minor} is too old: {REMEDY}")));
        }
        Ok(found)
    }

    /// Compiles for `architecture`, such as `sm_80`.
    ///
    /// # Errors
    /// The source is refused, with the compiler's messages.
    pub(super) fn compile(&self, module: &Module, architecture: &str) -> Result<Compiled> {
        let text = c_string(module.source.text)?;
        let name = c_string(module.source.name)?;
        let headers: Vec<_> = module
            .headers()
            .map(|(name, text)| Ok((c_string(name)?, c_string(text)?)))
            .collect::<Result<_>>()?;
        let names: Vec<_> = headers.iter().map(|(name, _)| name.as_ptr()).collect();
        let texts: Vec<_> = headers.iter().map(|(_, text)| text.as_ptr()).collect();
        let mut program: Program = std::ptr::null_mut();
        // SAFETY: NUL-terminated strings and arrays of the length that is passed, all alive.
        let created = unsafe {
            (self.create)(
                &raw mut program,
                text.as_ptr(),
                name.as_ptr(),
                headers.len() as c_int,
                texts.as_ptr(),
                names.as_ptr(),
            )
        };
        self.check(created)?;
        let compiled = self.compile_program(program, &options(module, architecture));
        // SAFETY: created above and not used any more.
        unsafe { (self.destroy)(&raw mut program) };
        compiled.map_err(|log| {
            Error::Failed(format!("{} for {architecture}: {log}", module.source.name))
        })
    }

    fn compile_program(
        &self,
        program: Program,
        options: &[String],
    ) -> std::result::Result<Compiled, String> {
        let options: Vec<_> = options
            .iter()
            .map(|o| CString::new(o.as_str()).expect("no NUL in an option"))
            .collect();
        let pointers: Vec<_> = options.iter().map(|option| option.as_ptr()).collect();
        let text = |error: Error| error.to_string();
        // SAFETY: a program that exists, and buffers of the lengths that the library asked for.
        unsafe {
            let result = (self.compile)(program, pointers.len() as c_int, pointers.as_ptr());
            let mut size = 0;
            self.check((self.log_size)(program, &raw mut size)).map_err(text)?;
            let mut log = vec![0u8; size];
            self.check((self.log)(program, log.as_mut_ptr().cast())).map_err(text)?;
            let log = String::from_utf8_lossy(&log).trim_end_matches('\0').to_owned();
            self.check(result).map_err(|error| format!("{error}\n{log}"))?;
            self.check((self.cubin_size)(program, &raw mut size)).map_err(text)?;
            let mut cubin = vec![0u8; size];
            self.check((self.cubin)(program, cubin.as_mut_ptr().cast())).map_err(text)?;
            Ok(Compiled { cubin, log })
        }
    }

    /// The cubin's bytes, compiled if the cache has them not.
    ///
    /// # Errors
    /// As [`Nvrtc::compile`], and a cache that cannot be read or written.
    pub(super) fn cached(&self, module: &Module, architecture: &str) -> Result<Vec<u8>> {
        let parts = self.parts(module, architecture);
        let parts: Vec<&[u8]> = parts.iter().map(String::as_bytes).collect();
        let path = cache::get_or_make(module.stem(), &parts, "cubin", |path| {
            let compiled = self.compile(module, architecture)?;
            let failed = |e| Error::Failed(format!("{}: {e}", path.display()));
            std::fs::write(path, compiled.cubin).map_err(failed)
        })?;
        std::fs::read(&path).map_err(|e| Error::Failed(format!("{}: {e}", path.display())))
    }

    /// All that a cubin depends on.
    pub(super) fn parts(&self, module: &Module, architecture: &str) -> [String; 3] {
        let version = format!("NVRTC {}.{}", self.version.0, self.version.1);
        [version, options(module, architecture).join(" "), module.text()]
    }

    fn check(&self, result: c_int) -> Result<()> {
        if result == 0 {
            return Ok(());
        }
        // SAFETY: a static string of the library.
        let message = unsafe { CStr::from_ptr((self.message)(result)) };
        Err(Error::Failed(format!("NVRTC: {}", message.to_string_lossy())))
    }
}

fn options(module: &Module, architecture: &str) -> Vec<String> {
    let mut options = vec![
        format!("--gpu-architecture={architecture}"),
        "-std=c++17".into(),
        "--ptxas-options=-v".into(),
        "--generate-line-info".into(),
    ];
    options.extend(module.options());
    options
}

fn c_string(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Error::Failed("a kernel's source holds a NUL".into()))
}

/// `libnvrtc.so` and its versions in a folder, the newest first.
fn libraries_in(folder: &Path) -> Vec<PathBuf> {
    files(folder, "libnvrtc.so")
}

fn files(folder: &Path, beginning: &str) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let begins = |path: &PathBuf| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(beginning))
    };
    let mut files: Vec<_> = entries.flatten().map(|entry| entry.path()).filter(begins).collect();
    files.sort_by(|a, b| b.cmp(a));
    files
}

/// Where Python's packages are: of the environment that is active, or of `python3`.
fn site_packages() -> Vec<PathBuf> {
    let ask = "import site, sysconfig; print(sysconfig.get_path('purelib')); \
               print(site.getusersitepackages()); print(*site.getsitepackages(), sep='\\n')";
    let asked = std::process::Command::new("python3").args(["-c", ask]).output();
    let answer = asked.map(|output| output.stdout).unwrap_or_default();
    String::from_utf8_lossy(&answer).lines().map(PathBuf::from).collect()
}
