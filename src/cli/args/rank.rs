//! The arguments that say which rank a target gets.

use std::num::NonZeroU64;

use clap::Args;

/// At most one of them, as the group that a verb makes of them has it.
#[derive(Debug, Args)]
#[command(next_help_heading = "Rank: one of")]
pub(in super::super) struct RankArgs {
    /// At most this rank for every target
    #[arg(long, value_name = "R")]
    pub rank: Option<NonZeroU64>,
    /// Per target, the smallest rank that keeps this share of the square of its update, such as 0.99
    #[arg(long, value_name = "SHARE", allow_hyphen_values = true)]
    pub energy: Option<String>,
    /// Per target, the smallest rank that is off by at most this share of its update, such as 0.05
    #[arg(long, value_name = "SHARE", allow_hyphen_values = true)]
    pub error: Option<String>,
    /// The ranks that lose least for factors of so many values in all, such as 5000000, or bytes, such as 20MB
    #[arg(long, value_name = "N|BYTES")]
    pub budget: Option<String>,
}
