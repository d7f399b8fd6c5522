//! Where bytes come from and how files appear: positioned reads (plain or mapped), a staging area that is published whole or not
//! at all, and digests. No formats here.

mod digest;
pub(crate) mod disk;
mod exclusive;
mod fault;
mod map;
mod publish;
mod shelf;
mod source;
mod threads;

pub(crate) use digest::{ContentRoot, TensorHash, structure_digest, tensor_digest};
pub(crate) use exclusive::{Exclusive, journal_of, pending, refuse_pending};
pub use publish::{Durability, Overwrite};
pub(crate) use publish::{OutputKind, Staging, check_output, free_space, parent_of, write_error};
pub(crate) use shelf::{Kept, most_threads};
pub use source::ReadMode;
pub(crate) use source::{ByteSource, open, read_error, read_small};
pub(crate) use threads::on_threads;
