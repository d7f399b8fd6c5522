//! Limits on what a file may ask of us, as a value: every reader takes one, every bound has a unit, a default, and a test on
//! both sides. Numbers from a file are compared with these and with the file's length before anything is allocated.

/// Bounds on input. `Default` is what the command line uses.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Longest safetensors header, bytes. Default 100,000,000, the reference reader's own cap.
    pub header_bytes: u64,
    /// Most tensors in one file. Default 1,000,000.
    pub tensors: usize,
    /// Longest tensor name, bytes. Default 1024.
    pub name_bytes: usize,
    /// Longest value in `__metadata__`, bytes. Default 32 MiB: the manifest of 50,000 targets.
    pub metadata_bytes: usize,
    /// Highest rank of a factor pair. Default 4096.
    pub rank: u64,
    /// Longest JSON config, bytes. Default 1 MiB.
    pub config_bytes: u64,
    /// Longest shard index, bytes. Default 100,000,000.
    pub index_bytes: u64,
    /// Steps that one match of a backtracking pattern may take. Default 100,000.
    pub regex_steps: usize,
    /// Problems shown in one report before the rest is only counted. Default 50.
    pub problems_shown: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            header_bytes: 100_000_000,
            tensors: 1_000_000,
            name_bytes: 1024,
            metadata_bytes: 32 << 20,
            rank: 4096,
            config_bytes: 1 << 20,
            index_bytes: 100_000_000,
            regex_steps: 100_000,
            problems_shown: 50,
        }
    }
}
