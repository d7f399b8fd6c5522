//! The command line comes with the next commits.

fn main() {}
