//! `include/yusur_np.h` and `src/table.rs` are one interface: a C compiler prints sizes, offsets and constants, and they are
//! compared one by one. Without a C compiler there is nothing to compare with, and the test says so.

use std::fmt::Write;
use std::path::Path;
use std::process::Command;

use dpumesh_yusur::table::{CONSTANTS, FUNCTIONS, LAYOUTS, ProgramEntry, Table};

#[test]
fn header_and_types_are_one_interface() {
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".to_owned());
    if Command::new(&compiler).arg("--version").output().is_err() {
        eprintln!("not shown: no C compiler (`{compiler}`)");
        return;
    }
    let mut expected = String::new();
    let mut program = String::from("#include <stdio.h>\n#include \"yusur_np.h\"\nint main(void) {\n");
    let mut line = |expression: String, value: i128| {
        let _ = writeln!(
            program,
            "printf(\"%s %lld\\n\", \"{expression}\", (long long)({expression}));"
        );
        let _ = writeln!(expected, "{expression} {value}");
    };
    for (name, value) in CONSTANTS {
        // As C prints it: a 64-bit mask of ones is -1.
        line(
            (*name).to_owned(),
            if *value > i128::from(i64::MAX) {
                *value - (1 << 64)
            } else {
                *value
            },
        );
    }
    for (name, size, fields) in LAYOUTS {
        line(format!("sizeof({name})"), *size as i128);
        for (field, offset) in *fields {
            line(format!("offsetof({name}, {field})"), *offset as i128);
        }
    }
    line(
        "sizeof(ynp_program_entry)".to_owned(),
        size_of::<ProgramEntry>() as i128,
    );
    line(
        "offsetof(ynp_program_entry, mask)".to_owned(),
        std::mem::offset_of!(ProgramEntry, mask) as i128,
    );
    line(
        "offsetof(ynp_program_entry, value)".to_owned(),
        std::mem::offset_of!(ProgramEntry, value) as i128,
    );
    line("sizeof(ynp_table)".to_owned(), size_of::<Table>() as i128);
    for (name, offset) in FUNCTIONS {
        line(format!("offsetof(ynp_table, {name})"), *offset as i128);
    }
    program.push_str("return 0;\n}\n");

    let folder = tempfile::tempdir().expect("a folder");
    let (source, binary) = (folder.path().join("layout.c"), folder.path().join("layout"));
    std::fs::write(&source, program).expect("written");
    let include = Path::new(env!("CARGO_MANIFEST_DIR")).join("include");
    let compiled = Command::new(&compiler)
        .args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-I"])
        .args([&include, &source, Path::new("-o"), &binary])
        .output()
        .expect("the compiler runs");
    assert!(
        compiled.status.success(),
        "{}",
        String::from_utf8_lossy(&compiled.stderr)
    );
    let printed = Command::new(&binary).output().expect("the program runs");
    let printed = String::from_utf8_lossy(&printed.stdout).into_owned();
    for (is, wanted) in printed.lines().zip(expected.lines()) {
        assert_eq!(is, wanted, "the header, and the types");
    }
    assert_eq!(printed.lines().count(), expected.lines().count());
}
