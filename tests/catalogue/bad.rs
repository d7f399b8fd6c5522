//! What a bad input is, how the library must refuse it, and the table form of the tests.

use loratool::{Error, ReadMode, Result, Values, open_adapter, open_checkpoint, validate_adapter, validate_checkpoint};

use crate::scene::{FACTORS, MODEL, Scene, within};

/// What is asked of the inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    Merge,
    MergeMapped,
    ValidateBase,
    ValidateAdapter,
}

/// Scenes that must all be refused in the same way.
pub struct Bad {
    pub scenes: Vec<Scene>,
    pub ask: Ask,
    pub exit: u8,
    pub rule: &'static str,
    says: Vec<String>,
    file: Option<String>,
    tensor: Option<String>,
    offset: Option<u64>,
}

impl Bad {
    /// One scene, refused with this exit code and rule.
    pub fn scene(exit: u8, rule: &'static str, scene: Scene) -> Bad {
        Bad { scenes: vec![scene], ask: Ask::Merge, exit, rule, says: Vec::new(), file: None, tensor: None, offset: None }
    }

    /// These bytes in the place of the base's file.
    pub fn base(exit: u8, rule: &'static str, bytes: impl AsRef<[u8]>) -> Bad {
        Bad::scene(exit, rule, Scene::sound().with(MODEL, bytes))
    }

    /// These bytes in the place of the adapter's file.
    pub fn adapter(exit: u8, rule: &'static str, bytes: impl AsRef<[u8]>) -> Bad {
        Bad::scene(exit, rule, Scene::sound().with(FACTORS, bytes))
    }

    /// These bytes in either place: no reader of headers is more lenient here than the other.
    pub fn file(exit: u8, rule: &'static str, bytes: impl AsRef<[u8]>) -> Bad {
        let mut bad = Bad::base(exit, rule, &bytes);
        bad.scenes.extend(Bad::adapter(exit, rule, &bytes).scenes);
        bad
    }

    pub fn ask(self, ask: Ask) -> Bad {
        Bad { ask, ..self }
    }

    /// The message or the help has these words.
    pub fn says(mut self, words: impl Into<String>) -> Bad {
        self.says.push(words.into());
        self
    }

    /// The file that is named.
    pub fn file_named(self, end: &str) -> Bad {
        Bad { file: Some(end.to_owned()), ..self }
    }

    /// The tensor, or the key of a JSON file, that is named.
    pub fn tensor(self, name: &str) -> Bad {
        Bad { tensor: Some(name.to_owned()), ..self }
    }

    /// The offset from the start of the file.
    pub fn at(self, offset: usize) -> Bad {
        Bad { offset: Some(offset as u64), ..self }
    }

    fn check(&self) {
        for scene in &self.scenes {
            let before = scene.snapshot();
            let error = match attempt(scene, self.ask) {
                Err(error) => error,
                Ok(()) => panic!("accepted; expected {}", self.rule),
            };
            self.check_error(&error);
            assert!(scene.snapshot() == before, "the attempt left something behind, or changed its inputs: {error}");
        }
    }

    fn check_error(&self, error: &Error) {
        let first = &error.diagnostics()[0];
        let helps: Vec<&str> = error.diagnostics().iter().filter_map(|d| d.help_text()).collect();
        let text = format!("{error}\n{}", helps.join("\n"));
        assert_eq!((first.rule().id, error.class().exit_code()), (self.rule, self.exit), "{text}");
        assert!(!text.chars().any(|c| c.is_control() && c != '\n'), "not escaped: {text:?}");
        let file = first.place().file.as_ref().map(|f| f.display().to_string()).unwrap_or_default();
        assert!(!file.is_empty(), "no file is named: {text}");
        if let Some(end) = &self.file {
            assert!(file.ends_with(end.as_str()), "{file} is named, not {end}");
        }
        if self.tensor.is_some() {
            assert_eq!(first.place().tensor, self.tensor, "{text}");
        }
        if self.offset.is_some() {
            assert_eq!(first.place().offset, self.offset, "{text}");
        }
        for words in &self.says {
            assert!(text.contains(words.as_str()), "{words:?} is not said:\n{text}");
        }
    }
}

fn attempt(scene: &Scene, ask: Ask) -> Result<()> {
    let (base, adapter) = (scene.at("base"), scene.at("adapter"));
    match ask {
        Ask::Merge => scene.merge(ReadMode::Read, |_| {}).map(drop),
        Ask::MergeMapped => scene.merge(ReadMode::Map, |_| {}).map(drop),
        Ask::ValidateBase => within(|| validate_checkpoint(&open_checkpoint(base)?, Values::Read).map(drop)),
        Ask::ValidateAdapter => within(|| validate_adapter(&open_adapter(adapter)?, None, &Default::default()).map(drop)),
    }
}

/// Checks a row.
#[expect(clippy::print_stderr, reason = "says which case of the row the panic was about")]
pub fn check(row: Vec<Bad>) {
    for (i, bad) in row.iter().enumerate() {
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| bad.check()));
        if let Err(payload) = caught {
            eprintln!("in case {i} of the row");
            std::panic::resume_unwind(payload);
        }
    }
}

/// A row of a table: its name, and how to make its inputs.
#[cfg(feature = "cli")]
pub type Row = (&'static str, fn() -> Vec<Bad>);

/// A table of bad inputs: a test for each row, and all of them as `ROWS` for the tests of the binary.
macro_rules! rows {
    ($($name:ident => $row:expr;)*) => {
        $(
            #[test]
            fn $name() {
                $crate::bad::check($row)
            }
        )*

        /// Every row of this table.
        #[cfg(feature = "cli")]
        pub const ROWS: &[$crate::bad::Row] = &[$((stringify!($name), || $row),)*];
    };
}
pub(crate) use rows;
