//! What becomes of files when the disk fails, the process is killed, or the power goes. The program is run with the cargo feature
//! `faults`, once for every call that it makes to the disk: `cargo test --locked --features faults --test faults`.

mod disk;
mod errors;
mod kills;
mod power;
mod rows;
mod scene;
