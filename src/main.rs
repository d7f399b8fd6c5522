//! The `loratool` binary: everything is in the library.

fn main() -> std::process::ExitCode {
    loratool::cli::main()
}
