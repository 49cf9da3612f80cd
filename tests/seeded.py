"""Seeded bugs, as data: what is changed in the engine, and which tests must fail then. `tests/mutants.py` runs them.

Those with `faults` take the defence away that the table of faults (docs/faults.md) is about; their tests carry the mark of the fault.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BEYOND_OUR_CODE", "MUTANTS", "Mutant"]


@dataclass(frozen=True)
class Mutant:
    """`old` stands once in `file` and becomes `new`, and so it is with (file, old, new) of `also`; at least one of `tests` must fail then.

    Attributes:
        tests: paths, or `path::name`, separated by spaces.
        faults: numbers of the faults whose defence is gone.
        also: where a second line of defence hides that the first one is gone.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str
    faults: tuple[int, ...] = ()
    also: tuple[tuple[str, str, str], ...] = ()

    @property
    def edits(self) -> tuple[tuple[str, str, str], ...]:
        return ((self.file, self.old, self.new), *self.also)


BEYOND_OUR_CODE = {
    66: "the servers that the tests run against: seaweedfs, moto and rclone, beside the one in memory",
}
"""Faults whose defence is no line of the package, and where it is."""

POWER, WAL, TAIL, TABLE = (
    "tests/unit/test_power_cut.py",
    "tests/unit/test_wal.py",
    "tests/unit/test_tail.py",
    "tests/unit/test_pagetable.py",
)
RETENTION, PLAN, LEVELS = "tests/unit/test_retention.py", "tests/unit/test_plan.py", "tests/unit/test_levels.py"
COMPACTOR, LTX, S3, RESTORE = (
    "tests/unit/test_compactor.py",
    "tests/unit/test_ltx.py",
    "tests/storage/test_s3.py",
    "tests/unit/test_restore.py",
)
STEPS, ERRORS, ATTACH = (
    "tests/e2e/test_every_step_fails.py",
    "tests/e2e/test_errors_on_the_way.py",
    "tests/e2e/test_attach_and_checkpoint.py",
)
V3RESTORE, LIBRARY, DOWNTIME = "tests/unit/test_v3restore.py", "tests/e2e/test_library.py", "tests/e2e/test_downtime.py"
SECURITY, KEEPER, LEASE = "tests/unit/test_security.py", "tests/unit/test_keeper.py", "tests/unit/test_lease.py"
REPLICAS, TAKEOVER, SOAK = "tests/e2e/test_several_replicas.py", "tests/e2e/test_takeover.py", "tests/crash/test_soak.py"

MUTANTS = [
    # -- process and machine
    Mutant(
        "what dead restores left is not swept", "publish.py", "    _sweep(output)\n    _refuse_existing", "    _refuse_existing",
        "tests/crash/test_killed_at_each_step.py::test_killed", (1,),
    ),
    Mutant(
        "a file is named before it is synced", "atomic.py", "                sync_file(self._file)\n", "                pass\n",
        f"{POWER}::test_an_atomic_write_leaves_the_old_file_or_the_new_one", (2,),
    ),
    Mutant(
        "a name is not synced", "atomic.py", "            sync_file(self._directory)\n\n\ndef write_file", "            pass\n\n\ndef write_file",
        f"{POWER}::test_an_atomic_write_leaves_the_old_file_or_the_new_one", (2,),
    ),
    Mutant(
        "any number of threads work on databases at once", "gate.py", "len(self._inside) < self._places and not self.waiting", "True",
        "tests/unit/test_gate.py",
    ),
    Mutant(
        "writers are locked out by who has no place", "loop.py", "            with gate():\n", "            if True:\n", "tests/unit/test_gate.py",
    ),
    Mutant(
        "a disk that hangs holds a place", "storage/file.py", "waiting=gate().aside", "waiting=contextlib.nullcontext", "tests/unit/test_gate.py",
    ),
    Mutant(
        "a file that comes while a keeper looks is overlooked", "upkeep.py", "self._working[keeping] = True", "pass",
        "tests/unit/test_upkeep.py",
    ),
    Mutant(
        "a damaged page table is trusted", "pagetable.py", "return self._xor(self.state.commit) == self.state.xor", "return True",
        f"{POWER}::test_a_page_table_after_a_power_cut_is_a_state_that_it_had_or_known_to_be_none {DOWNTIME}::test_a_damaged_page_table_is_found_and_rebuilt",
        (2,),
    ),
    Mutant("entries behind the end come back", "pagetable.py", "        if commit > old.commit:  # a crash", "        if commit < 0:  # a crash", TABLE),
    Mutant(
        "a file that cannot be synced is named", "atomic.py", "                sync_file(self._file)\n                _give_name",
        "                with contextlib.suppress(OSError):\n                    sync_file(self._file)\n                _give_name",
        f"{STEPS}::test_an_fsync_that_fails_once_is_an_unknown_outcome_and_is_not_asked_again", (3,),
    ),
    Mutant(
        "a lease is not looked at after sleeping", "lease.py",
        "        if term is not None and is_in_force(term, self._clock.now()):\n            return term.record.generation\n",
        "        if term is not None:\n            return term.record.generation\n",
        f"{LEASE}::test_an_owner_whose_time_is_over_asks_before_it_acts_and_goes_on_when_nobody_took_it", (4,),
    ),
    Mutant(
        "a forked child keeps the lock", "engine.py", "    for engine in _engines:\n        engine._forget_lock()\n", "    pass\n",
        f"{ERRORS}::test_a_forked_child_does_not_keep_the_database_locked_when_its_parent_is_killed", (5,),
    ),
    Mutant(
        "a second engine is let in", "engine.py", "                fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n", "",
        f"{LIBRARY}::test_a_second_engine_is_refused", (6,),
    ),
    Mutant(
        "what is not stored at the end is not said", "api.py", "            if board.fatal is None:\n                self.wait(timeout_s=timeout_s)\n",
        "            pass\n", f"{ERRORS}::test_close_is_prompt_while_the_store_is_away", (7,),
    ),
    Mutant(
        "the last sync waits without end", "api.py", "                self.wait(timeout_s=timeout_s)\n", "                self.wait(timeout_s=timeout_s + 20)\n",
        f"{ERRORS}::test_close_is_prompt_while_the_store_is_away", (7,),
    ),
    Mutant(
        "a table of ours is in the schema", "db.py", "            self._ensure_wal_mode()\n",
        '            self._ensure_wal_mode()\n            self._writer.execute("CREATE TABLE IF NOT EXISTS _pyrepl_seq(id INTEGER PRIMARY KEY, seq INTEGER)")\n',
        f"{LIBRARY}::test_nothing_is_added_to_the_schema", (8,),
    ),
    Mutant(
        "a defect ends the thread in silence", "loop.py", "        except Exception as error:\n            self._board.fail(error)\n",
        "        except Exception:\n            pass\n", f"{ERRORS}::test_a_defect_in_the_engine_is_reported_and_not_swallowed", (9,),
    ),
    Mutant(
        "the lock stays with a forked child after the end", "engine.py", "                fcntl.flock(self._lock_file, fcntl.LOCK_UN)  # a forked child may share it\n", "",
        f"{ERRORS}::test_the_lock_is_free_after_close_though_a_forked_child_lives", (5,),
        (("engine.py", "    for engine in _engines:\n        engine._forget_lock()\n", "    pass\n"),),
    ),
    Mutant(
        "the daemon does not say at its end what is not stored", "member.py", '        log.error("not everything was stored', '        log.debug("not everything was stored',
        "tests/e2e/test_daemon.py::test_what_did_not_get_through_is_said_and_the_exit_code_is_not_zero", (7,),
    ),
    Mutant(
        "the journal of a followed copy has no name on the disk", "inplace.py", "        sync_file(self._file)\n        sync_directory(os.path.dirname(self._path))\n", "        sync_file(self._file)\n",
        "tests/unit/test_inplace.py::test_a_power_cut_at_any_call_leaves_the_old_state_or_the_new_one", (2,),
    ),
    Mutant(
        "that there are no more threads is a defect", "uploader.py", "        raise OSError(errno.EAGAIN, f\"cannot start a thread: {error}\") from error\n", "        raise\n",
        f"{STEPS}::test_no_more_threads", (9, 24),
    ),
    Mutant(
        "a killed process had acknowledged what it had not stored", "replica.py", "        for file in files:\n            self._store(file)\n        self._make_sure", "        self._make_sure",
        "tests/crash/test_sigkill.py::test_ten_kills_lose_nothing_that_was_acknowledged", (1,),
    ),
    Mutant(
        "the journal of a followed copy is cold", "inplace.py", "            journal.make_hot()\n", "", "tests/unit/test_inplace.py::test_a_death_at_any_call_leaves_the_old_state_or_the_new_one", (1,)
    ),
    Mutant(
        "an unreadable configuration is an error without a name", "cli/configured.py", "    except OSError as error:\n        raise ConfigError(f\"cannot read config file", "    except ZeroDivisionError as error:\n        raise ConfigError(f\"cannot read config file",
        f"{STEPS}::test_loading_the_configuration", (1,),
    ),
    # -- SQLite and the local database
    Mutant("the last commit frame is left out", "format/wal.py", "int(found[-1]) + 1 if", "int(found[-1]) if", WAL),
    Mutant("frame checksums are ignored", "format/wal.py", "(sums == fields[:count, 4:]).all(axis=1)", "(sums == sums).all(axis=1)", WAL),
    Mutant("frames of page 0 are taken", "format/wal.py", " & (fields[:, 0] != 0)", "", WAL),
    Mutant(
        "any restart of the WAL is continued", "tail.py", "    if restart_proven:\n", "    if restart_proven is not None:\n",
        f"{TAIL}::test_other_salts_continue_only_when_the_restart_is_proven", (10,),
    ),
    Mutant(
        "a WAL that restarted while nobody looked is continued", "tail.py", "    if restart_proven:\n", "    if restart_proven is not None:\n",
        f"{DOWNTIME}::test_the_released_litestream_loses_rows_where_we_do_not", (69,),
    ),
    Mutant(
        "salts are not looked at again after the first scan", "engine.py", "if first and not self._database.salts_are(position.salts):", "if False:",
        f"{ATTACH}::test_a_wal_that_restarts_during_the_first_scan_loses_nothing", (11,),
    ),
    Mutant(
        "salts are ignored", "format/wal.py", "(fields[:, 2] == salts[0]) & (fields[:, 3] == salts[1]) & ", "",
        f"{WAL}::test_a_damaged_frame_is_the_end", (12,),
    ),
    Mutant(
        "frames of an older run of the WAL are taken", "format/wal.py", "(fields[:, 2] == salts[0]) & (fields[:, 3] == salts[1]) & ", "",
        f"{WAL}::test_frames_of_an_older_run_of_the_wal_are_the_end", (12,), (("format/wal.py", "(sums == fields[:count, 4:]).all(axis=1)", "(sums == sums).all(axis=1)"),),
    ),
    Mutant(
        "the last frame's checksum is not compared", "tail.py", "\n            and (last_frame.checksum1, last_frame.checksum2) == position.checksum", "",
        f"{TAIL}::test_an_overwritten_or_missing_last_frame_resynchronises", (12,),
    ),
    Mutant(
        "no version of SQLite is warned about", "db.py", "(3, 7, 0) <= version < (3, 51, 3)", "(3, 7, 0) <= version < (3, 7, 0)",
        f"{ATTACH}::test_checkpoints_of_others_are_warned_about_where_sqlite_has_the_wal_reset_bug", (13,),
    ),
    Mutant(
        "a checkpoint waits for readers", "db.py", '        busy, _, _ = self._checkpointer.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()\n        return replace(',
        '        busy, _, _ = self._checkpointer.execute("PRAGMA wal_checkpoint(FULL)").fetchone()\n        return replace(',
        f"{ATTACH}::test_a_long_reader_holds_up_neither_a_checkpoint_nor_a_writer", (14,),
    ),
    Mutant(
        "the WAL is not pinned", "db.py", '    connection.execute("PRAGMA user_version").fetchone()\n', "",
        f"{ATTACH}::test_checkpoints_of_others_after_one_of_ours_lose_nothing", (15,),
    ),
    Mutant(
        "a database never shrinks", "engine.py", "header = self._header(txid, txid, changes.commit, changes.end)",
        "header = self._header(txid, txid, max(changes.commit, self._commit), changes.end)", f"{LIBRARY}::test_auto_vacuum_shrinks_the_restored_file_too",
        (16,),
    ),
    Mutant(
        "a VACUUM does not shrink a database", "engine.py", "header = self._header(txid, txid, changes.commit, changes.end)",
        "header = self._header(txid, txid, max(changes.commit, self._commit), changes.end)",
        f"{LIBRARY}::test_restore_is_byte_equal_through_checkpoints_vacuum_and_growth", (16,),
    ),
    Mutant(
        "growth pages are forgotten", "engine.py", "        if not len(grown) or len(grown) == int((changes.pgnos > self._commit).sum()):\n", "        if True:\n",
        f"{ATTACH} {LIBRARY}",
    ),
    Mutant(
        "nobody sees that the database was replaced", "engine.py", "            if self._database.replaced():\n", "            if False:\n",
        f"{LIBRARY}::test_a_deleted_database_is_reported_and_a_new_one_continues_the_chain", (17,),
    ),
    Mutant(
        "an old WAL stays beside the restored file", "publish.py", "                side.rename(temporary.with_name(temporary.name + suffix))\n",
        "                side.exists()\n", f"{V3RESTORE}::test_mode_and_side_files_are_those_of_every_restore", (18,),
    ),
    Mutant("a failed restore keeps the old WAL", "publish.py", "                _put_back(temporary, output)\n        raise\n", "                pass\n        raise\n", f"{STEPS}::test_restore", (1, 18, 23)),
    Mutant(
        "damage in the WAL is taken for its end", "engine.py", "        if changes is None and self._database.is_end_doubtful:\n", "        if False:\n",
        f"{ATTACH}::test_a_damaged_frame_is_not_taken_for_the_end_of_the_wal", (19,),
    ),
    Mutant(
        "the lock page is a page like others", "format/sqlite.py", "    return Pgno(", "    return Pgno(1 + ", f"{LTX}::test_a_snapshot_passes_over_the_lock_page", (20,)
    ),
    Mutant(
        "the header of the database is not looked at", "db.py", "        if head and head != SQLITE_MAGIC:\n", "        if False:\n",
        "tests/e2e/test_cli.py::test_what_is_not_a_database_is_refused", (21,),
        (("db.py", '        if "not a database" in text or "malformed" in text:\n', "        if False:\n"),),
    ),
    Mutant(
        "a database with two names is taken", "db.py", "        if found.st_nlink > 1 and stat.S_ISREG(found.st_mode):\n", "        if False:\n",
        f"{ATTACH}::test_a_database_with_two_names_is_refused", (22,),
    ),
    Mutant(
        "a symbolic link is taken for the database", "api.py", "self._path = Path(os.path.realpath(path))", "self._path = Path(path)",
        f"{ATTACH}::test_a_database_behind_a_symbolic_link_is_replicated", (22,),
    ),
    Mutant(
        "the staging folder has no bound", "outbox.py", "return used >= self.limit_bytes or", "return",
        f"{ERRORS}::test_the_bound_of_the_staging_folder_holds_for_large_files", (23,),
    ),
    Mutant(
        "the last of the disk is taken", "outbox.py", " or self._free_bytes() < DISK_RESERVE_BYTES\n", "\n",
        f"{ERRORS}::test_the_last_of_the_disk_is_left_to_the_application", (23,),
        (("outbox.py", "        if self._free_bytes() < DISK_RESERVE_BYTES:\n", "        if False:\n"),),
    ),
    Mutant(
        "a staged file that fails is left", "outbox.py", "        except BaseException:\n            path.unlink(missing_ok=True)\n            raise\n",
        "        except BaseException:\n            raise\n", f"{STEPS}::test_staging_and_upload {STEPS}::test_snapshot", (1, 23),
    ),
    Mutant(
        "an entry that could not be noted is dropped", "loop.py", "        self._unsettled = entry\n        self._engine.settled(entry)\n", "        self._engine.settled(entry)\n",
        f"{ERRORS}::test_an_entry_is_not_dropped_by_an_error_on_the_way", (24,),
    ),
    Mutant(
        "a small file is decoded in one piece", "compactor.py", "SLICE_BYTES = 32 << 10", "SLICE_BYTES = 32 << 20",
        f"{COMPACTOR}::test_memory_does_not_grow_with_what_compresses_well", (25,),
    ),
    Mutant(
        "the whole WAL is read under the write lock", "db.py", "LOCKED_READ_BYTES = 8 << 20", "LOCKED_READ_BYTES = 8 << 40",
        f"{ATTACH}::test_the_write_lock_is_not_held_for_reading_a_long_wal", (26,),
    ),
    Mutant(
        "a time in the future is never left again", "engine.py", "            self._timestamp_ms = now\n        self._timestamp_ms = max", "        self._timestamp_ms = max",
        f"{ERRORS}::test_a_clock_that_was_in_the_future_once_does_not_hide_what_follows", (27,),
    ),
    Mutant(
        "a clock that was set back decides about deletion", "retention.py", "    if newest is not None and newest.created_at.timestamp() > now + CLOCK_TOLERANCE_S:\n", "    if False:\n",
        f"{KEEPER}::test_a_clock_that_was_set_back_stops_deletion_and_nothing_else", (27,),
    ),
    Mutant(
        "a clock that jumped forward decides about deletion", "keeper.py", "        if abs(jump) < CLOCK_JUMP_S:\n", "        if True:\n",
        f"{KEEPER}::test_a_clock_that_jumps_forward_delays_deletion", (27,),
    ),
    Mutant(
        "a lost page table begins empty", "joining.py", '    return _rebuild(head, lineage, folder / "pages", page_size)\n',
        '    return PageTable.create(folder / "pages", lineage=lineage, page_size=page_size)\n', f"{DOWNTIME}::test_a_deleted_metadata_folder_is_rebuilt_from_the_replica", (70,),
    ),
    Mutant(
        "a restored copy begins at TXID 1", "joining.py", '    return _rebuild(head, lineage, folder / "pages", page_size)\n',
        '    return PageTable.create(folder / "pages", lineage=lineage, page_size=page_size)\n', f"{DOWNTIME}::test_a_restored_copy_continues_the_chain", (49,),
    ),
    Mutant(
        "small files of other page sizes are merged", "compactor.py", "        if headers and reader.header.page_size != headers[0].page_size:\n", "        if False:\n",
        f"{COMPACTOR}::test_merging_never_crosses_a_change_of_the_page_size", (71,),
    ),
    Mutant(
        "large files of other page sizes are merged", "compactor.py", "        if inputs and following.header.page_size != inputs[0].header.page_size:\n", "        if False:\n",
        f"{COMPACTOR}::test_merging_never_crosses_a_change_of_the_page_size", (71,),
    ),
    Mutant(
        "whatever happened while nobody looked, the WAL is continued", "db.py", "        proven = self._attached and self._restart_allowed\n", "        proven = True\n",
        f"{DOWNTIME}::test_only_differing_pages_are_uploaded_after_downtime", (10,),
    ),
    Mutant(
        "what was read counts before it is encoded", "engine.py", "        self._preserve(changes)\n        entry = self._encode(changes, wal)\n",
        "        self._preserve(changes)\n        self._database.attached(changes.end)\n        self._position = changes.end\n        entry = self._encode(changes, wal)\n",
        f"{ATTACH}::test_what_the_first_scan_read_and_could_not_encode_is_not_skipped_when_the_wal_restarts", (11,),
    ),
    Mutant(
        "the last commit frame is not committed", "format/wal.py", "int(found[-1]) + 1 if", "int(found[-1]) if",
        f"{WAL}::test_a_short_last_frame_is_left_out_and_a_transaction_without_commit_is_not_counted", (19,),
    ),
    Mutant(
        "the page table grows into a hole of the disk", "pagetable.py", "        os.posix_fallocate(file, 0, size)\n", "        os.ftruncate(file, size)\n",
        f"{TABLE}::test_a_disk_that_is_full_when_the_table_grows_leaves_it_as_it_was", (23,),
    ),
    Mutant(
        "local state of another history is taken", "joining.py", "    if table is not None and stored and table.state.lineage not in stored:\n", "    if False:\n",
        f"{DOWNTIME}::test_metadata_of_another_database_is_refused", (70,),
        (("replica.py", "        if recorded is not None and recorded != lineage:\n", "        if False:\n"),),
    ),
    Mutant(
        "a file that was replaced is read on", "engine.py", "            if self._database.replaced():\n", "            if False:\n",
        f"{ATTACH}::test_a_database_that_is_replaced_while_it_is_read_is_not_mixed_with_the_new_one", (17,),
    ),
    Mutant(
        "a file that cannot be made keeps its folder open", "atomic.py", "        except BaseException:\n            os.close(self._directory)\n            raise\n        return self\n", "        except BaseException:\n            raise\n        return self\n",
        f"{STEPS}::test_sync", (24,),
    ),
    Mutant(
        "another page size is a difference like others", "engine.py", "        if state.txid and state.page_size != image.page_size:\n", "        if False:\n",
        f"{REPLICAS}::test_a_replica_that_missed_a_change_of_the_page_size_gets_a_full_image", (71,),
    ),
    Mutant(
        "what a checkpoint read under the write lock is dropped", "engine.py", "            self._tails.append(result.tail)\n", "            pass\n", f"{STEPS}::test_checkpoint", (1, 11)
    ),
    Mutant(
        "what a checkpoint read ahead is dropped", "db.py", "        tails = [*ahead, result.tail] if result.tail is not None else ahead\n",
        "        tails = [result.tail] if result.tail is not None else []\n", f"{ATTACH}::test_what_is_committed_while_a_checkpoint_prepares_is_read_under_the_lock", (11,),
    ),
    Mutant(
        "a snapshot is not told of what a checkpoint read ahead", "db.py", "        for part in ahead:\n            before_move(part)", "        for part in ahead:\n            pass",
        f"{ATTACH}::test_a_snapshot_keeps_what_a_checkpoint_reads_ahead_and_copies",
    ),
    Mutant(
        "a checkpoint gives way to that of the application", "db.py", "            if not busy or time.monotonic() > end:\n", "            if True:\n",
        f"{ATTACH}::test_a_checkpoint_waits_for_that_of_the_application", (15,),
    ),
    Mutant(
        "the pin stays in slot 0 during an upload", "loop.py", "            self._settle_pin()\n", "",
        f"{ATTACH}::test_others_can_copy_again_before_an_upload_has_ended", (15,),
    ),
    Mutant(
        "a reader that stays is met at every look", "engine.py", "            elif result.contended or not result.goes_on:\n", "            elif result.contended:\n",
        f"{ATTACH}::test_a_reader_that_stays_is_not_met_at_every_look", (14,),
    ),
    Mutant(
        "writers are held when a rollback fails", "db.py", "        except sqlite3.Error:\n            # The application must", "        except sqlite3.Error:\n            raise\n            # The application must",
        f"{STEPS}::test_checkpoint", (1, 11),
    ),
    Mutant(
        "a write lock that was reported as failed is kept", "db.py", "                if self._writer.in_transaction:  # begun, and reported as failed\n", "                if False:\n",
        f"{ATTACH}::test_a_write_lock_that_was_taken_and_reported_as_failed_is_let_go", (26,),
    ),
    # -- object store
    Mutant(
        "an outage ends replication", "uploader.py", "                self._wait(error, delay)\n                continue\n", "                board.fail(error)\n                return\n",
        "tests/e2e/test_hostile_s3.py::test_replication_and_restore_come_through_everything_that_an_honest_store_does", (28,),
    ),
    Mutant(
        "a condition that was lost against ourselves is a refusal", "storage/s3.py", 'if about.get("RetryAttempts", 0):', "if about is None:",
        f"{S3}::test_a_condition_that_fails_after_a_retry_is_unknown", (29,),
    ),
    Mutant(
        "a merged file has the time of its making", "format/merge.py", "first.min_txid, last.max_txid, last.timestamp_ms)",
        'first.min_txid, last.max_txid, __import__("time").time_ns() // 1000)', f"{KEEPER}::test_what_compaction_stores_is_the_same_again_after_a_crash", (30,),
    ),
    Mutant(
        "parts of a failed upload stay", "storage/s3.py", "                self._s3.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload)\n", "                pass\n",
        f"{S3}::test_a_failed_upload_in_parts_is_aborted", (31,),
    ),
    Mutant(
        "an object that is shorter than it was listed is whole", "chain.py", '                if at < info.size:\n                    raise _Short(f"the stream ended at {at} of {info.size} bytes")\n',
        "                return\n", f"{RESTORE}::test_an_object_that_is_shorter_than_it_was_listed_is_corrupt", (31,),
    ),
    Mutant(
        "a listing is taken as it comes", "storage/s3.py", "files = sorted(found.values(), key=lambda info: (info.min_txid, info.max_txid))", "files = [*found.values()]",
        f"{S3}::test_an_unordered_listing_with_repeats_is_put_right", (32,),
    ),
    Mutant(
        "a listing that does not end is whole", "storage/s3.py", "            if not token or token in seen:\n", "            if not token or token in seen:\n                return\n",
        f"{S3}::test_a_listing_that_does_not_end_is_an_error", (32,),
    ),
    Mutant("another range than asked is taken", "storage/s3.py", "if first != offset or last - first + 1 != length:", "if first < 0:", S3),
    Mutant(
        "a dropped download goes on with the beginning", "chain.py", "            with client.open(info, offset=at) as stream:\n", "            with client.open(info) as stream:\n",
        f"{RESTORE}::test_a_dropped_connection_is_resumed_at_its_offset", (33,),
    ),
    Mutant(
        "deletion does not check what is reached", "retention.py", "    if before != after:\n        raise NonContiguous(after, before)\n    for", "    for",
        RETENTION,
    ),
    Mutant(
        "deletion does not look at what would remain", "retention.py", "if (level, info.min_txid, info.max_txid) not in going] for level", "] for level",
        f"{RETENTION}::test_nothing_goes_when_the_rest_would_reach_less", (34,),
    ),
    Mutant(
        "a restore does not plan again", "publish.py", "REPLANS = 2", "REPLANS = 0", f"{RESTORE}::test_a_file_that_retention_deletes_meanwhile_is_planned_around", (34,)
    ),
    Mutant("raw files are deleted before they are merged", "retention.py", " or info.max_txid > merged:", ":", RETENTION),
    Mutant("the newest raw file is deleted", "retention.py", "for info in raw[:-1]:", "for info in raw:", RETENTION),
    Mutant("the only full image before the window is deleted", "retention.py", "doomed = list(old[:-1])", "doomed = list(old)", RETENTION),
    Mutant(
        "without the store nothing begins", "loop.py", '        if board.state == "starting":\n            board.begin(engine.open(), engine.txid)\n', "",
        f"{ERRORS}::test_a_start_without_the_store_begins_when_it_is_back_whatever_fails_next", (35,),
    ),
    Mutant(
        "a clock that the store refuses is any refusal", "storage/s3.py", '    if code == "RequestTimeTooSkewed":\n', "    if code is None:\n",
        f"{S3}::test_a_wrong_clock_is_named_with_both_times", (36,),
    ),
    Mutant(
        "a lease is taken where conditions are ignored", "lease.py", "                if not (conditions.create and conditions.replace):\n", "                if conditions is None:\n",
        f"{LEASE}::test_a_store_that_ignores_conditions_is_refused", (37,),
    ),
    Mutant(
        "checksum trailers are sent", "storage/s3.py", 'request_checksum_calculation="when_required"', 'request_checksum_calculation="when_supported"',
        f"{S3}::test_a_put_is_one_plain_signed_request", (38,),
    ),
    Mutant(
        "a batch delete has no MD5", "storage/s3.py", "    if settings.content_md5:\n", "    if False:\n",
        f"{S3}::test_batch_deletes_carry_content_md5_where_it_is_required", (38,),
    ),
    Mutant(
        "a key that may only write is refused", "joining.py", "            if table is None or not table.is_intact or not known.get(replica.url):\n                raise\n", "            raise\n",
        f"{LIBRARY}::test_a_key_that_may_only_write_is_enough_after_the_first_start", (39,),
    ),
    Mutant(
        "what may not be deleted ends the keeper", "keeper.py", "        except (ReplicatorError, OSError) as error:\n            self._failed(task.name, error)\n", "        except OSError as error:\n            self._failed(task.name, error)\n",
        f"{KEEPER}::test_without_the_right_to_delete_the_replica_grows_and_everything_else_goes_on", (39, 40),
    ),
    Mutant(
        "nobody waits for room", "loop.py", "        while self._engine.can_snapshot and self._is_full():\n", "        while False:\n",
        f"{ERRORS}::test_a_store_that_is_slower_than_the_application_holds_a_bounded_queue_and_shows_its_lag", (41,),
        (("engine.py", "return None if self._staging.is_full() else self._staging.stage(entry)", "return self._staging.stage(entry)"),),
    ),
    Mutant(
        "a checkpoint takes commits into a folder that is full", "loop.py", "        if engine.checkpoint_due() and not self._is_full():", "        if engine.checkpoint_due():",
        f"{ERRORS}::test_no_checkpoint_takes_commits_into_a_folder_that_is_full", (23,),
    ),
    Mutant(
        "a staged file goes before its proof is written", "engine.py", "        if self._known is not None:\n            self._known.note(self.replicas)  # the staged file was the proof that the stored one is ours\n", "",
        f"{REPLICAS}::test_how_far_a_replica_has_come_is_written_down_before_a_staged_file_goes", (42,),
    ),
    Mutant(
        "what was staged is forgotten", "joining.py", "        if txid < max_txid <= newest:\n", "        if max_txid < 0:\n",
        f"{LIBRARY}::test_what_was_staged_in_an_outage_is_stored_by_the_next_start", (42,),
    ),
    Mutant(
        "a replica that lost files is taken", "replica.py", "        if self.txid < known_txid:\n", "        if self.txid < 0:\n",
        f"{ERRORS}::test_an_emptied_replica_is_refused_at_each_start_and_not_only_at_the_first {ERRORS}::test_a_replica_that_is_emptied_after_a_kill_is_refused", (42, 63),
    ),
    Mutant(
        "retention is always due", "retention.py", "    if not found:\n        return None\n", "    if not found:\n        return now + 3600\n",
        f"{KEEPER}::test_a_database_without_writes_makes_no_request_and_has_nothing_due", (43,),
    ),
    Mutant(
        "an outage ends the keeper", "keeper.py", "        except (ReplicatorError, OSError) as error:\n            self._failed(task.name, error)\n", "        except AccessDenied as error:\n            self._failed(task.name, error)\n",
        f"{KEEPER}::test_an_outage_delays_the_keeper_and_nothing_is_lost", (28,),
    ),
    Mutant(
        "what is there already is somebody else's", "replica.py", "            if not self._holds(file):\n                raise StorageError(", "            raise Fenced(self.url, file.max_txid) from None\n            if not self._holds(file):\n                raise StorageError(",
        f"{STEPS}::test_storing_and_reading_over_the_network", (29,),
    ),
    Mutant(
        "raw files are listed last", "chain.py", "    raw = one(0)\n    with", "    with", f"{RESTORE}::test_raw_files_are_listed_before_all_others", (32,),
        (("chain.py", "        return {0: raw, **dict(zip(levels[1:], pool.map(one, levels[1:]), strict=True))}\n", "        return dict(zip(reversed(levels), pool.map(one, reversed(levels)), strict=True))\n"),),
    ),
    Mutant(
        "an ignored range is not noticed", "storage/s3.py", "            if length == total:\n", "            if length < 0:\n", f"{S3}::test_a_range_is_exact_whatever_the_server_makes_of_it", (33,),
        (("storage/s3.py", "            if length != wanted:\n", "            if length < 0:\n"),),
    ),
    Mutant(
        "a database begins anew whatever the replica says", "member.py", "            except NoBackups:\n                log.info(\"nothing to restore", "            except Exception:\n                log.info(\"nothing to restore",
        "tests/e2e/test_configured.py::test_a_missing_database_does_not_begin_anew_while_its_replica_is_unreachable", (35,),
    ),
    Mutant(
        "a second create that succeeds is a kept condition", "storage/probe.py", "        else:\n            return Conditions(create=False, replace=False)\n", "        else:\n            pass\n",
        f"{S3}::test_the_probe_tells_the_conditions_apart_and_cleans_up", (37,),
    ),
    Mutant(
        "the outcome of a conflict is known", "storage/s3.py", "status in (408, 409, 425, 429)", "status in (408, 425, 429)",
        "tests/e2e/test_hostile_s3.py::test_a_write_without_an_answer_is_of_unknown_outcome", (29,), (("storage/s3.py", '        "ConditionalRequestConflict",\n', ""),),
    ),
    Mutant(
        "an image of ours whose reply was lost is not known again", "replica.py", "                self.record(info)\n                return True\n        return False\n", "                return False\n        return False\n",
        f"{REPLICAS}::test_an_image_whose_reply_was_lost_is_stored_again_without_taking_it_for_somebody_elses", (29,),
    ),
    Mutant(
        "a damaged file is merged again and again", "keeper.py", "            self._set_aside(task.inputs, error)\n", "", f"{KEEPER}::test_a_raw_file_that_was_cut_short_is_damage", (31,)
    ),
    Mutant(
        "a body that ends early is whole", "storage/s3.py",
        "        with self._translated():\n            piece: bytes = self._body.read(size)\n        if not piece:\n            raise StorageUnavailable(f\"connection ended before the object did: {self._name}\")\n",
        "        piece = b\"\"\n        with contextlib.suppress(Exception):\n            piece = self._body.read(size)\n        if not piece:\n            self._rest = 0\n",
        f"{S3}::test_a_body_that_ends_early_is_unavailable_and_not_short", (33,),
        (("storage/s3.py", "            wanted -= len(piece)\n", "            wanted = wanted - len(piece) if piece else 0\n"),),
    ),
    Mutant(
        "files that somebody else deleted are planned with", "keeper.py", "            self.replica.relist()  # somebody else deletes here, too\n", "",
        f"{KEEPER}::test_files_that_somebody_else_deletes_do_not_stop_the_keeper", (34,),
    ),
    Mutant(
        "retention lists what is known", "keeper.py", "        now, files = self._clock(), self.replica.listing()\n        self._not_before", "        self.replica.relist()\n        now, files = self._clock(), self.replica.listing()\n        self._not_before",
        f"{KEEPER}::test_the_right_to_list_is_not_needed_after_the_start", (39,),
    ),
    # -- split brain and failover
    Mutant(
        "other bytes of another writer are taken for ours", "replica.py", "        if not same:\n            raise Fenced(self.url, file.max_txid)\n", "",
        f"{LIBRARY}::test_another_writer_on_the_replica_stops_us", (44,),
    ),
    Mutant("acknowledged without being stored", "replica.py", "        for file in files:\n            self._store(file)\n        self._make_sure", "        self._make_sure", LIBRARY),
    Mutant(
        "a tail that only the old owner has is dropped", "engine.py", "            tenant.salvaged = salvage(self._database, self._folder)\n", "            tenant.salvaged = None\n",
        f"{TAKEOVER}::test_takeover_restores_claims_and_keeps_the_old_owners_tail", (45,),
    ),
    Mutant(
        "a lease is counted by one clock", "clock.py", "    return max(now.steady - since.steady, now.wall - since.wall)\n", "    return now.steady - since.steady\n",
        f"{LEASE}::test_an_owner_counts_by_the_longer_of_its_clocks_and_stops_before_an_observer_begins", (46,),
    ),
    Mutant(
        "an owner acts to the last moment of its lease", "tenure.py", " < term.record.ttl_s * (1 - MARGIN)", " < term.record.ttl_s",
        f"{LEASE}::test_an_owner_counts_by_the_longer_of_its_clocks_and_stops_before_an_observer_begins", (46,),
    ),
    Mutant(
        "what came between look and claim is not seen", "engine.py", "            if newest != self._tenant.looked_at:\n", "            if False:\n",
        f"{TAKEOVER}::test_a_late_write_of_the_old_owner_before_the_claim_is_taken_over_too", (47,),
    ),
    Mutant(
        "replicas with two histories are joined", "joining.py", "    if same is False or (same is None and not are_recorded):\n        raise", "    if same == 0 and False:\n        raise",
        f"{REPLICAS}::test_a_txid_that_two_writers_gave_out_is_refused_when_its_replica_is_back", (45, 48),
    ),
    Mutant(
        "the table is trusted whoever wrote its TXID", "joining.py", "        if table is not None and not _is_of_one_history(table, head, seen, staging):\n", "        if False:\n",
        f"{REPLICAS}::test_the_table_is_not_trusted_where_another_writer_stored_its_txid", (48,),
    ),
    Mutant(
        "a replica of a newer version is written to", "replica.py", "    if version > LINEAGE_VERSION:\n", "    if False:\n",
        "tests/e2e/test_versions.py::test_a_replica_of_a_newer_version_is_left_alone", (50,),
    ),
    Mutant(
        "any version of a file is read", "format/ltx.py", "    if magic != MAGIC:\n", "    if magic[:3] != MAGIC[:3]:\n", "tests/e2e/test_versions.py::test_an_ltx_file_of_another_version_is_refused_by_name", (50,),
    ),
    Mutant(
        "any version of a page table is read", "pagetable.py", "    if fields[0] != MAGIC or zlib.crc32(data[: _SLOT.size - 4]) != fields[-1]:\n", "    if zlib.crc32(data[: _SLOT.size - 4]) != fields[-1]:\n",
        "tests/e2e/test_versions.py::test_a_page_table_of_another_version_is_made_anew_from_the_replica", (50,),
    ),
    Mutant(
        "any version of a parked state is read", "parking.py", '        if body["version"] != VERSION:\n', "        if False:\n",
        "tests/e2e/test_versions.py::test_a_record_of_a_parked_database_of_another_version_counts_for_nothing", (50,),
    ),
    Mutant(
        "an owner whose time is over acts", "lease.py", "        if term is not None and is_in_force(term, self._clock.now()):\n            return term.record.generation\n", "        if term is not None:\n            return term.record.generation\n",
        f"{STEPS}::test_lease", (1, 46),
    ),
    # -- hostile inputs
    Mutant(
        "the file checksum is not compared", "format/ltx.py", "if got != trailer.file_checksum:", "if got < 0:",
        f"{LTX}::test_every_flipped_bit_of_the_worked_example_is_refused", (51,),
    ),
    Mutant("the page index is not compared", "format/ltx.py", "        if self._found.digest() != self._expected.digest():\n", "        if self._found is None:\n", LTX),
    Mutant(
        "pages may come in any order", "format/ltx.py", '        if pgno <= last:\n            raise FormatError(f"out-of-order page numbers: {last},{pgno}")\n        if header', "        if header",
        f"{LTX}::test_pages_that_break_a_rule_are_refused_with_the_peers_words", (52,),
    ),
    Mutant(
        "room is made for as many pages as a header says", "chain.py", "limit, of_image = min(commit, most),", "limit, of_image = min(commit, 1 << 24),",
        f"{RESTORE}::test_a_huge_commit_is_refused_before_anything_is_allocated", (52,),
    ),
    Mutant("a block may be of any size", "format/ltx.py", "if size > bound:", "if size < 0:", f"{LTX}::test_a_block_longer_than_any_page_needs_is_refused_before_it_arrives", (53,)),
    Mutant(
        "a frame gives as much as it likes", "format/ltx.py", "max_length=page_size + 1", "max_length=-1", f"{LTX}::test_a_frame_that_grows_beyond_the_page_is_refused", (53,)
    ),
    Mutant(
        "a page may have any size", "format/ltx.py", "                if len(page) != page_size:\n                    raise", "                if False:\n                    raise",
        f"{LTX}::test_a_block_of_another_size_than_the_page_is_refused", (53,),
    ),
    Mutant(
        "tracked checksums are written", "format/ltx.py", "        if not header.flags & NO_CHECKSUM:\n            raise FormatError(\"only", "        if False:\n            raise FormatError(\"only",
        f"{LTX}::test_files_with_tracking_are_not_written", (54,),
    ),
    Mutant(
        "a tracked checksum is not compared", "format/ltx.py", "        elif self._tracked and trailer", "        elif False and trailer",
        f"{LTX}::test_a_tracked_snapshot_is_read_when_its_checksum_is_that_of_its_pages", (54,),
    ),
    Mutant(
        "names of objects may lead anywhere", "storage/base.py", "    if not _OBJECT_NAME.fullmatch(name):\n", "    if False:\n",
        "tests/storage/test_v3_clients.py::test_names_outside_are_refused", (55,),
    ),
    Mutant(
        "names of control objects may lead anywhere", "storage/base.py", "    if not _CONTROL_NAME.fullmatch(name) or _LTX_FOLDER.fullmatch(name):\n", "    if False:\n",
        "tests/storage/test_clients.py::test_the_contract", (55,),
    ),
    Mutant(
        "a name that begins like one of ours is ours", "format/ltx.py", "    match = _NAME.fullmatch(name)\n", "    match = _NAME.match(name)\n",
        "tests/storage/test_clients.py::test_foreign_names_in_a_level_are_ignored", (56,),
    ),
    Mutant(
        "aliases count as one", "yamltree.py", "                self._add(*self._anchors[event.anchor], None)\n", "                self._add(self._anchors[event.anchor][0], 1, None)\n",
        "tests/unit/test_yamltree.py::test_what_would_take_much_is_refused_soon tests/unit/test_fuzz_targets.py::test_a_bomb_of_aliases_is_refused_in_bounded_time_and_memory", (57,),
    ),
    Mutant(
        "a redirect is asked about again and again", "storage/s3.py", '    api.meta.events.register("before-call.s3.HeadBucket", _do_not_follow)\n', "",
        f"{S3}::test_a_redirect_never_takes_the_credentials_to_another_host", (58,),
    ),
    Mutant(
        "a redirect is followed", "storage/webdav.py", "                    redirect=False,\n", "                    redirect=True,\n",
        "tests/storage/test_other_stores.py::test_a_redirect_does_not_get_the_password", (58,), (("storage/webdav.py", "            redirect=0,\n", "            redirect=3,\n"),),
    ),
    Mutant(
        "the answer of the server is in the message", "storage/s3.py", '    return text if _ERROR_CODE.fullmatch(text) else ""\n', "    return text\n",
        f"{S3}::test_text_of_the_server_never_reaches_a_message", (59,),
    ),
    Mutant(
        "settings show their secrets", "storage/url.py", "    secret_access_key: str | None = field(default=None, repr=False)\n", "    secret_access_key: str | None = None\n",
        f"{S3}::test_secrets_are_in_no_representation", (59,),
    ),
    Mutant(
        "the schema of a restored database is trusted", "publish.py", "PRAGMA trusted_schema=OFF", "PRAGMA trusted_schema=ON",
        f"{SECURITY}::test_a_restored_database_is_checked_without_trusting_its_schema", (60,),
    ),
    Mutant(
        "the schema of a database that is replicated is trusted", "db.py", '            connection.execute("PRAGMA trusted_schema=OFF")  # it may be a restored one\n', "",
        f"{SECURITY}::test_no_connection_of_the_engine_trusts_a_schema", (60,),
    ),
    Mutant(
        "a temporary file is readable by all", "atomic.py", "flags, mode, dir_fd=directory", "flags, 0o666, dir_fd=directory",
        f"{SECURITY}::test_a_file_is_private_from_its_first_moment", (61,),
    ),
    Mutant(
        "a planted link is followed", "atomic.py", "os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC", "os.O_RDWR | os.O_CREAT | os.O_CLOEXEC",
        f"{SECURITY}::test_a_link_that_was_planted_under_the_temporary_name_is_not_followed", (61,),
    ),
    Mutant(
        "a restored database is readable by all", "publish.py", "os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)", "os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)",
        f"{RESTORE}::test_mode_is_kept_with_force_and_private_otherwise", (61,),
    ),
    Mutant(
        "the wrong key is damage", "storage/age.py", '            if "No matching keys" in str(exc):\n', "            if False:\n", "tests/storage/test_age.py::test_the_wrong_key_is_not_damage", (62,)
    ),
    Mutant(
        "a gap between segments is passed over", "v3plan.py", "        if info.index > expected:\n            raise", "        if False:\n            raise",
        "tests/unit/test_v3plan.py::test_a_missing_beginning_is_named", (64,),
    ),
    Mutant(
        "a hole in a WAL file is passed over", "replay.py", "        if info.offset > wal.offset:\n", "        if False:\n", f"{V3RESTORE}::test_offsets_beyond_four_gibibytes_join", (64,)
    ),
    Mutant(
        "a restore does not compare the checksum of a file", "format/ltx.py", "if got != trailer.file_checksum:", "if got < 0:", f"{RESTORE}::test_every_damaged_byte_of_every_file_is_found", (51,)
    ),
    Mutant(
        "TXIDs may be the wrong way round", "format/ltx.py", "        if self.min_txid > self.max_txid:\n", "        if False:\n", f"{LTX}::test_a_header_that_means_nothing_is_refused", (52,)
    ),
    Mutant(
        "an LZ4 frame comes out in one piece", "format/v3.py", "self._decompressor.decompress(data, self._piece_bytes)", "self._decompressor.decompress(data, -1)",
        "tests/unit/test_v3_format.py::test_a_bomb_comes_out_in_bounded_pieces", (53,),
    ),
    Mutant(
        "unknown keys are passed over", "configtable.py", "            if key not in known and not", "            if not key and not", "tests/unit/test_config.py::test_unknown_keys_are_refused_with_their_place", (57,)
    ),
    Mutant(
        "settings of other stores show their secrets", "storage/locations.py", "    account_key: str | None = field(default=None, repr=False)\n", "    account_key: str | None = None\n",
        "tests/unit/test_config.py::test_keys_of_other_stores", (59,),
    ),
    Mutant(
        "what appears at the output is overwritten", "publish.py", "    replaces = force or (found is not None and found.st_size == 0)\n", "    replaces = True\n",
        f"{RESTORE}::test_an_output_that_appears_meanwhile_is_not_overwritten", (61,),
    ),
    Mutant(
        "the control socket is open to all", "server.py", "        os.chmod(path, permissions)  # before it listens, nobody can connect\n", "",
        f"{SECURITY}::test_the_control_socket_is_private_before_anybody_can_connect", (61,),
    ),
    Mutant(
        "encryption that was asked for is forgotten", "storage/__init__.py", "    encrypted = bool(settings.age_identities or settings.age_recipients)\n", "    encrypted = False\n",
        "tests/unit/test_config.py::test_encryption_that_was_asked_for_never_becomes_plaintext", (62,),
    ),
    Mutant(
        "a block says itself how large its page is", "format/ltx.py", "page = decompress(block, page_size)", "page = decompress(block, max(page_size, 1 << 25))",
        "tests/unit/test_fuzz_targets.py::test_a_page_that_claims_to_be_huge_takes_no_memory", (53,), (("format/ltx.py", "if size > bound:", "if size < 0:"),),
    ),
    Mutant(
        "a checksum of nothing is passed over", "format/ltx.py", "            if trailer.post_apply_checksum:\n                raise", "            if False:\n                raise",
        f"{LTX}::test_a_post_apply_checksum_without_tracking_is_refused", (54,),
    ),
    Mutant(
        "a missing segment of 0.3 is passed over", "replay.py", "        if info.offset > wal.offset:\n", "        if False:\n", f"{V3RESTORE}::test_a_missing_segment_is_named_and_nothing_is_left", (64,)
    ),
    Mutant(
        "a decoder makes room for what the header says", "format/ltx.py", "        self._tracked = header.is_snapshot and not", "        self._room = bytearray(header.commit >> 6)\n        self._tracked = header.is_snapshot and not",
        "tests/unit/test_fuzz_targets.py::test_a_header_of_four_billion_pages_takes_no_memory", (52,),
    ),
    # -- of the tests themselves
    Mutant(
        "the crash machine does not look for what was acknowledged", "testing/machine.py", '        assert newest >= self._acknowledged, "acknowledged transactions are gone"\n', "",
        "tests/property/test_crash_recovery.py::test_an_acknowledgement_before_it_is_stored_is_noticed", (65,),
        (
            ("testing/machine.py", '            assert not self._acknowledged, "acknowledged transactions are gone"\n', ""),
            ("testing/machine.py", '        assert _state(copy) == self._history[-1], "what was acknowledged is not what is restored"\n', ""),
        ),
    ),
    Mutant(
        "the disk of a power cut keeps what was not synced", "testing/powercut.py", "    rest = file.done[file.synced :]\n",
        "    for change in file.done[file.synced :]:\n        _apply(data, change)\n    rest: list[tuple[int, bytes | None]] = []\n", f"{POWER}::test_a_forgotten_sync_is_found_out", (65,),
    ),
    Mutant(
        "the soak does not compare bytes", "testing/soak.py", "        if want != got:\n", "        if False:\n", f"{SOAK}::test_bytes_that_differ_are_noticed", (67,)
    ),
    Mutant(
        "the soak does not look for acknowledged rows", "testing/soak.py", "        if newest < acknowledged:\n", "        if False:\n", f"{SOAK}::test_a_row_that_is_lost_or_wrong_is_noticed", (67,)
    ),
    Mutant(
        "drills are not begun", "api.py", "        if self._drills is not None:\n            self._threads.append(", "        if False:\n            self._threads.append(",
        "tests/e2e/test_verify.py::test_drills_on_a_schedule_show_in_status_and_metrics", (68,),
    ),
    # -- of no fault in the table
    Mutant("a time includes its own moment", "plan.py", "info.created_at >= self._timestamp", "info.created_at > self._timestamp", PLAN),
    Mutant("a gap is passed over", "plan.py", "        if beyond:\n            raise NonContiguous(current, min(beyond))\n    if not plan or", "    if not plan or", PLAN),
    Mutant("merging goes across a gap", "levels.py", "        if inputs and info.min_txid > inputs[-1].max_txid + 1:\n            break\n", "", LEVELS),
    Mutant("the oldest page wins", "format/merge.py", "_ranked(pages, -rank)", "_ranked(pages, rank)", COMPACTOR),
    Mutant("pages behind the end are merged", "format/merge.py", "if newest < pgno <= commit:", "if newest < pgno:", COMPACTOR),
    Mutant("pages behind the end of a shrunk database are written", "chain.py", "if pgno <= limit and owners[pgno] == mine:", "if pgno > limit or owners[pgno] == mine:", RESTORE),
    Mutant(
        "published before it is checked", "publish.py",
        '        if integrity_check != "none":\n            _check(temporary, integrity_check)\n        _publish(temporary, output, force)\n',
        '        _publish(temporary, output, force)\n        if integrity_check != "none":\n            _check(temporary, integrity_check)\n', V3RESTORE,
    ),
]  # fmt: skip
