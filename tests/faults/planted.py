#!/usr/bin/env python3
"""Are the fault loops able to fail? Plants one bug at a time in a copy of the project, and says which tests turn red.

    python3 tests/faults/planted.py DIR     # DIR: a folder for the copy and its build

Ends with 1 if a bug is found by no test. Takes a few minutes; not a part of CI.
"""

import os
import re
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
FAULTS = ["--features", "faults", "--test", "faults"]

# What is broken; file; text; what it becomes; the tests that must see it.
BUGS = [
    ("P1: a file is not forced to disk before it gets its name", "src/io/publish.rs",
     "        false => disk::open(path).and_then(|file| disk::sync(&file)),", "        false => Ok(()),", FAULTS),
    ("P1: the folder is not forced to disk", "src/io/publish.rs",
     "Durability::Synced => disk::sync_dir(folder).map_err(|e| write_error(folder, e)),", "Durability::Synced => Ok(()),", FAULTS),
    ("P1: a failed sync is forgotten", "src/io/publish.rs",
     "sync_tree(&self.path, &self.target)\n", "sync_tree(&self.path, &self.target).or(Ok(()))\n", FAULTS),
    ("P2: the output gets its name before it is read back", "src/op/merge.rs",
     "    jobs.iter().try_for_each(|job| reread(",
     "    let _ = std::fs::rename(staging.path_of(\"\"), staging.target_of(\"\"));\n    jobs.iter().try_for_each(|job| reread(", FAULTS),
    ("P2: the first tensor of a file is left out", "src/exec/tasks.rs",
     "in output.shard.changes.iter().enumerate() {", "in output.shard.changes.iter().enumerate().skip(1) {", ["--test", "goldens"]),
    ("P1: a file counts as complete before it is on disk", "src/exec/crew.rs",
     "        output.file.with(disk::sync).map_err(|e| write_error(&output.path, e))?;\n        ledger", "        ledger", FAULTS),
    ("P3: bytes are written before their marks", "src/exec/roll.rs",
     "        self.journal.set_marks(window, marks, self.durability)?;\n        file.write(window.offset, out)",
     "        file.write(window.offset, out)?;\n        self.journal.set_marks(window, marks, self.durability)", FAULTS),
    ("P3: marks are not forced to disk", "src/exec/journal.rs",
     "Durability::Synced => disk::sync_data(&self.file).map_err(|e| write_error(&self.path, e)),", "Durability::Synced => Ok(()),", FAULTS),
    ("P3: files are open to readers meanwhile", "src/exec/roll.rs",
     "        file.write(0, &POISON)?;\n", "        let _ = (file, POISON);\n", ["--test", "in_place"]),
    ("P3: the journal goes before the files are on disk", "src/exec/roll.rs",
     "    site.force(durability)?;\n    let mut rolled", "    let mut rolled", FAULTS),
    ("P3: values are checked while they are written", "src/op/in_place.rs",
     "    let old = exec::prove(&plan, &numbered(true), &limited, progress)?;",
     "    let old = exec::prove(&plan, &numbered(true), &limited, progress).unwrap_or_else(|_| vec![1; 99]);", ["--test", "in_place"]),
]


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    copy = os.path.join(sys.argv[1], "planted")
    survivors = 0
    for what, name, text, planted, tests in BUGS:
        shutil.rmtree(copy, ignore_errors=True)
        subprocess.run(["git", "clone", "--quiet", ROOT, copy], check=True)
        path = os.path.join(copy, name)
        with open(path) as file:
            source = file.read()
        if source.count(text) == 0:
            sys.exit(f"{what}: the text to break is no longer in {name}")
        with open(path, "w") as file:
            file.write(source.replace(text, planted, 1))
        env = os.environ | {"CARGO_TARGET_DIR": os.path.join(sys.argv[1], "planted-target")}
        done = subprocess.run(["cargo", "test", "--locked", *tests], cwd=copy, env=env, capture_output=True, text=True)
        red = re.findall(r"^test (\S+) \.\.\. FAILED", done.stdout, re.M)
        if done.returncode != 0 and not red:
            sys.exit(f"{what}: {done.stderr[-2000:]}")
        survivors += not red
        print(f"{'red' if red else 'GREEN'}: {what}: {', '.join(red)}", flush=True)
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
