import os
import subprocess
import sys

import pytest
from proof.crash_recording import why_no_strace

from stepsave.testing.crashes import FAILED_SYNC
from stepsave.testing.posix_model import Operation, Sync
from stepsave.testing.recording import files_below, record
from stepsave.testing.strace_log import MARK, parse_strace, strace_command

SCRIPT = """
import os, sys
from stepsave.testing.strace_log import mark_in_trace
root = sys.argv[1]
mark = mark_in_trace if len(sys.argv) == 2 else None

def act(root, mark):
    fd = os.open(root + "/a", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.write(fd, b"abc")
    os.writev(fd, [b"d", b"ef\\n"])
    os.pwrite(fd, bytes(range(256)), 1)
    os.pwritev(fd, [b"Y", b"Z"], 2)
    os.posix_fallocate(fd, 0, 600)
    os.ftruncate(fd, 10)
    os.fdatasync(fd)
    os.close(fd)
    os.mkdir(root + "/d")
    os.rename(root + "/a", root + "/d/b")
    os.link(root + "/d/b", root + "/c")
    os.unlink(root + "/c")
    os.replace(root + "/old", root + "/d/b")
    fd = os.open(root + "/d", os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    os.unlink(root + "/d/b")
    os.rmdir(root + "/d")
    mark("acknowledged", 7)
"""


@pytest.mark.skipif(bool(why_no_strace()), reason=why_no_strace())
def test_both_ways_of_recording_make_the_same_log(tmp_path):
    logs = []
    for name in ("here", "traced"):
        root = tmp_path / name
        root.mkdir()
        (root / "old").write_bytes(b"old")
        if name == "here":
            scope = {}
            source = SCRIPT.partition("mark = ")[0].partition("root = ")[0]
            body = SCRIPT[SCRIPT.index("def act") :]
            exec(source + body, scope)
            with record(root, syncs=True) as recorder:
                scope["act"](str(root), recorder.mark)
            logs.append(recorder.log)
        else:
            before = files_below(root)
            script = SCRIPT + "\nact(root, mark)\n"
            command = [*strace_command(tmp_path / "trace"), sys.executable, "-c", script, str(root)]
            subprocess.run(command, check=True, timeout=60)
            builder = parse_strace((tmp_path / "trace").read_text(), root, before)
            builder.check_complete(files_below(root))
            logs.append(builder.log)
    assert logs[0].operations == logs[1].operations
    assert len(logs[0].operations) > 15


def test_calls_that_other_threads_interrupt_are_put_together():
    text = "\n".join(
        [
            f'7 openat(AT_FDCWD, "{hexed("/r/a")}", O_WRONLY|O_CREAT, 0666) = 3',
            f'7 write(3, "{hexed("x")}", 1 <unfinished ...>',
            "8 fsync(3 <unfinished ...>",
            "7 <... write resumed>) = 1",
            "8 <... fsync resumed>) = 0",
            "7 fsync(3) = -1 EIO (Input/output error)",
            f'7 access("{hexed(f"{MARK}/-1/{FAILED_SYNC}/r/a")}", F_OK) = -1 ENOTDIR (Not a ...)',
            f'7 access("{hexed(f"{MARK}/5/acknowledged")}", F_OK) = -1 ENOTDIR (Not a directory)',
        ]
    )
    created, written, sync, failed, told, mark = parse_strace(text, "/r", {}).log.operations
    assert [one.kind for one in (created, written, mark)] == ["create", "write", "acknowledged"]
    assert isinstance(written, Operation)
    assert written.effects[0].data == b"x"
    assert (sync.covers, sync.failed) == (1, False)  # what was not written when it began
    assert (failed.covers, failed.failed) == (3, True)
    assert isinstance(told, Sync)
    assert told.failed


def test_a_number_may_be_that_of_another_file_before_its_closing_ends():
    text = "\n".join(
        [
            f'7 openat(AT_FDCWD, "{hexed("/r/a")}", O_WRONLY|O_CREAT, 0666) = 3',
            "7 close(3 <unfinished ...>",
            f'8 openat(AT_FDCWD, "{hexed("/r/b")}", O_WRONLY|O_CREAT, 0666) = 3',
            "7 <... close resumed>) = 0",
            f'8 write(3, "{hexed("x")}", 1) = 1',
        ]
    )
    builder = parse_strace(text, "/r", {})
    builder.check_complete({"a": b"", "b": b"x"})


def test_what_strace_has_cut_is_refused():
    text = f'7 openat(AT_FDCWD, "{hexed("/r/a")}", O_WRONLY|O_CREAT, 0666) = 3\n'
    text += f'7 write(3, "{hexed("xy")}"..., 3) = 3'
    with pytest.raises(AssertionError, match="has cut"):
        parse_strace(text, "/r", {})


def hexed(text):
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(text))
