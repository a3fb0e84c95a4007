"""Breaks the library in one place at a time and asks whether the tests notice.

    python tests/mutants.py            # every mutant; exit code 1 if one survives
    python tests/mutants.py 3 7        # some of them
    python tests/mutants.py methods/   # those of the sources whose names begin so

Each mutant is a small edit of one source file, made in a copy of the sources; the tests named beside it must fail, and
without the edit they must pass.  What all of them import is loaded once: every run is a fork of this process.
"""

import contextlib
import importlib
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = "tests/laws/test_files.py"
SQUEEZE = "tests/laws/test_squeeze.py"
ODD = "tests/laws/test_engine_odd.py"
OPTIM, MOVES = "tests/laws/test_optimisers.py", "tests/laws/test_optimisers_more.py"
SEAMS = "tests/laws/test_optimisers_seams.py"
SERVED, KEYS = "tests/interop/test_serve_http.py", "tests/interop/test_serve_keys.py"
USE = "tests/interop/test_use_"
POOL, POLICIES = "tests/laws/test_pool.py", "tests/oracles/test_policies.py"
DORA = "tests/oracles/test_dora.py"
LAWS, DISK, METHODS = "tests/laws/test_laws.py", "tests/laws/test_disk.py", "tests/oracles/test_methods.py"
DAMAGE = DISK + "::test_damage_is_refused"
WEIGHT = LAWS + "::test_forward_is_weight"
FUSED, GRADIENTS = LAWS + "::test_fused_is_reference", LAWS + "::test_gradients"
SHELF = "tests/laws/test_frozen.py"
READER = "tests/interop/test_encoder.py"
ROUTES = "tests/laws/test_routes.py"
VALUES = "tests/laws/test_values.py"
GROUPS = LAWS + "::test_rows_of_low_rank_adapters"
HOLES, WORK = "tests/laws/test_holes.py", "tests/laws/test_step_work.py"
COLLAPSE, DIAGNOSE = "tests/oracles/test_collapse.py", "tests/oracles/test_diagnose.py"
CHOICES = "tests/oracles/test_study_choices.py"
STUDY = "tests/interop/test_study.py::test_runs_on_other_rows_are_not_mixed_in"
SWEPT = "tests/interop/test_study.py::test_each_seed_sweeps_for_itself_and_the_chosen_run_alone_is_tested"
HALVED_ALONE = "tests/interop/test_study.py::test_what_halving_compares_with_does_not_depend_on_who_runs_beside"
COUNTS = "tests/interop/test_study.py::test_points_before_the_budget_is_reached_are_not_chosen"
LAST = "tests/interop/test_study.py::test_of_equal_points_the_last_is_kept"
MODEL = "tests/interop/test_study.py::test_runs_on_another_model_are_not_mixed_in"
HALVING = "tests/interop/test_study.py::test_rates_are_halved_by_one_seed_and_made_whole_when_halving_is_off"
REPORT, STATISTICS = "tests/oracles/test_study_report.py", "tests/oracles/test_statistics.py"
COMPARE = "tests/interop/test_compare.py::test_runs_of_one_arm_differ_in_nothing_but_the_seed"
IMAGES = "tests/interop/test_images.py"
ACTIVATIONS = "tests/interop/test_activations.py"
GATED = "tests/oracles/test_gated.py"
ADALORA, GATES = "tests/oracles/test_ranks_adalora.py", "tests/oracles/test_ranks_gates.py"
STARTS, PROBE = "tests/oracles/test_starts.py", "tests/oracles/test_probe.py"
HOSTS, LORA, REGRESSIONS = "tests/interop/test_hosts.py", "tests/interop/test_peft_lora.py", "tests/regressions"
SPARSE = "tests/oracles/test_sparse.py"
GENERATED, LIBRARY = "tests/laws/test_generated.py", "tests/interop/test_library.py"
OPTIONS, SETTINGS = "tests/laws/test_layer_options.py", "tests/laws/test_settings.py"
LAYERS = "tests/interop/test_peft_layers.py"
AGAIN, RULES = "tests/interop/test_peft_again.py", "tests/interop/test_peft_rules.py"
FROZEN = "tests/oracles/test_frozen.py"
TENSOR = "tests/oracles/test_tensor.py"
RESTARTS = "tests/oracles/test_restarts.py"
COURSES = "tests/oracles/test_courses.py"
PROCEDURES = "tests/oracles/test_procedures.py"
PADDING = "tests/oracles/test_padding.py"
PACKING = "tests/laws/test_packing.py"
ATTENTION = "tests/laws/test_attention.py"
LABELLED, SEGMENTS = "tests/laws/test_labelled.py", "tests/laws/test_segments.py"
PREFERENCE, LOOK = "tests/interop/test_data_preference.py", "tests/interop/test_data_look.py"
CHAT, MEDIA = "tests/interop/test_data_chat.py", "tests/interop/test_data_media.py"
ENCODINGS = "tests/interop/test_data_encodings.py"
DATA = "tests/interop/test_data_training.py"
MASTERS = "tests/laws/test_masters.py"
DIFFUSERS = "tests/interop/test_diffusers.py"
GGUF = "tests/interop/test_gguf_write.py"
FAULTY = "tests/interop/test_faulty_rows.py"
HONEST = "tests/interop/test_honest_training.py"
RECIPE = "tests/interop/test_recipe.py"
DISTRIBUTED = "tests/interop/test_distributed.py"
PROCESSES = "tests/interop/test_processes.py"
WEIGHTS = "tests/laws/test_weights.py"
BY_REQUEST, ENGINE = "tests/laws/test_attention_by_request.py", "tests/laws/test_engine.py"
FAULTS, SAMPLING = "tests/laws/test_engine_faults.py", "tests/laws/test_sampling.py"
WORDS = "tests/laws/test_words.py"
JOBS, TOGETHER = "tests/laws/test_jobs.py", "tests/interop/test_study_together.py"

# (file below src/undula, what stands there, what the mutant puts there, tests that must notice)
MUTANTS = [
    ("federated/flat.py", "t.requires_grad and id(t) not in seen", "t.requires_grad", "tests/laws/test_rounds.py::test_what_is_sent_arrives"),
    ("federated/messages.py", "told.tobytes() != digest(like, how, base)", "False", "tests/laws/test_rounds.py::test_clients_with_other_frozen_factors_or_another_base_take_no_brief"),
    ("federated/server.py", "known[ROWS] != before", "False", "tests/laws/test_rounds.py::test_answers_count_in_the_clients_order_and_rows_stay_as_many"),
    ("federated/fedsvd.py", "(Q_OK @ U[:, kept]) * s[kept]", "Q_OK @ U[:, kept]", "tests/laws/test_federated.py::test_the_mean_of_the_updates_is_kept"),
    ("federated/fair.py", " - B_OR @ gram_RR  #", "  #", "tests/laws/test_federated.py::TestFAIR"),
    ("federated/exact.py", "free = size * complement(", "free = 0 * complement(", "tests/laws/test_federated.py::TestEvery"),
    ("federated/private/gradients.py", "self.masks.append(F.dropout(torch.ones_like(x), p))", "self.masks.append(torch.ones_like(x))", "tests/laws/test_privacy.py::test_what_dropout_lets_fall_falls_in_the_gradients_of_rows_too"),
    ("federated/private/hooks.py", "p._forward_counter += 1", "p._forward_counter = 1", "tests/laws/test_privacy.py::test_factors_that_layers_share_are_clipped_as_one"),
    ("federated/private/loop.py", "self.optimizer.signal_skip_step(part is not parts[-1])", "self.optimizer.signal_skip_step(False)", "tests/laws/test_privacy.py::test_rows_in_parts_and_no_rows_at_all"),
    ("federated/private/dpsgd.py", "return {k: v for k, v in counts.items() if k != \"loss\"}", "return counts", "tests/laws/test_private_rounds.py::test_rows_of_clients_are_private_in_rounds_and_the_record_says_what_was_spent"),
    ("federated/private/client_level.py", "min(1.0, self.clip / max(", "max(1.0, self.clip / max(", "tests/laws/test_private_rounds.py::test_a_client_changes_the_mean_by_its_clip_at_most"),
    ("federated/server.py", "self.asked.append(self.round + 1)", "self.asked = [*range(1, self.round + 2)]", "tests/laws/test_private_rounds.py::test_rows_of_clients_are_private_in_rounds_and_the_record_says_what_was_spent"),
    ("federated/flasc.py", "torch.lerp(-change, m", "torch.lerp(change, m", "tests/laws/test_federated.py::TestFLASC"),
    ("federated/part.py", "whole = old.detach().clone()", "whole = 0 * old.detach()", "tests/laws/test_parts.py::test_a_part_is_the_first_ranks_at_the_scale_of_all_and_goes_back_into_its_places"),
    ("federated/part.py", "scaling=Fixed(scale)", "scaling=Fixed(1.0)", "tests/laws/test_parts.py::test_a_part_is_the_first_ranks_at_the_scale_of_all_and_goes_back_into_its_places"),
    ("federated/part.py", "alone = method.undropped()", "alone = method.inside()", "tests/laws/test_parts.py::test_a_part_that_makes_no_sense_is_told_with_the_clients_name"),
    ("federated/desk.py", "party.r > (most := most_ranks(self.first, sites))", "party.r > (most := 99)", "tests/laws/test_parts.py::test_ranks_are_those_of_the_layers_that_a_client_has"),
    ("federated/server.py", "if why := privacy.declined(", "if why := False and privacy.declined(", "tests/laws/test_parts.py::test_a_budget_of_its_own_under_noise_at_the_server_ends_its_part"),
    ("federated/flasc.py", "top(P - flat(first) if self.from_start else P, self.down)", "top(P, self.down)", "tests/laws/test_federated.py::TestFLASC"),
    ("io/whole.py", "    named(told, path)\n", "", "tests/interop/test_killed_verbs.py::test_a_full_disk_is_told_with_the_place_and_what_to_do"),
    ("penalties/orthogonal_to_earlier.py", "if not here[site].requires_grad]", "if False]", "tests/laws/test_penalties.py::test_layers_that_a_task_before_has_not_are_told_and_a_frozen_A_is_refused"),
    ("federated/rounds.py", "except (Exception, SystemExit) as error", "except Exception as error", "tests/laws/test_parts.py::test_a_client_that_leaves_the_process_is_a_line_and_ctrl_c_ends_the_rounds"),
    ("federated/private/loop.py", "key = (*key, done) if done else key", "key = (*key,)", "tests/laws/test_parts.py::test_a_seed_gives_steps_that_go_on_other_noise"),
    ("federated/server.py", "return self.desk.score(self.federation.how.sent(adapter, self.desk.first), examples)", "return self.desk.score(adapter, examples)", "tests/laws/test_parts.py::test_what_a_sparse_way_is_measured_by_and_leaves_is_what_clients_are_sent"),
    ("federated/server.py", "if there[\"digest\"].get(k, digest[k]) != digest[k]", "if False", "tests/laws/test_rounds_again.py::test_rows_of_a_client_that_changed_meanwhile_are_told"),
    ("federated/client.py", "return notes if self.held is None else", "return notes if True else", "tests/laws/test_rounds_again.py::test_rows_that_the_model_cannot_take_leave_nothing"),
    ("federated/rounds.py", "@turn()\n", "", "tests/laws/test_rounds_again.py::test_trainings_of_one_process_take_turns"),
    ("federated/server.py", "adapters, weights = self.pool(sent", "self.pool(sent", "tests/laws/test_rounds.py::test_what_stands_before_the_aggregation_makes_what_it_gets"),
    ("compress/spectrum.py", "torch.sort(worth, descending=True", "torch.sort(worth, descending=False", SQUEEZE + "::test_a_budget_goes_where_it_keeps_most"),
    ("compress/updates.py", "without(A_RI if read is None else A_RI * read, padding)", "A_RI", SQUEEZE + "::test_full_parameters_ties_padding_and_the_rest_stay"),
    ("io/packing.py", "else t.numel() > max(shape)", "else t.numel() >= max(shape)", "tests/laws/test_quantise.py::test_what_is_small_or_counts_stays"),
    ("ranks/insqueeze.py", "self._remember(A_RI, T_RK.T, alive", "self._remember(A_RI, P_KR, alive", "tests/oracles/test_insqueeze.py::test_moments_are_those_of_the_new_factors_gradients"),
    ("generate/mixture.py", "(a * (mu - mean).square()).sum(0)", "0", GENERATED + "::test_the_variance_of_a_mixture_is_that_of_its_draws"),
    ("generate/library.py", "if found != wanted:", "if False:", GENERATED + "::test_a_library_takes_one_start_alone"),
    ("generate/pack.py", "first.setdefault(id(t), (site, factor))", "first.setdefault((site, factor), (site, factor))", GENERATED + "::test_factors_that_sites_share_are_packed_once"),
    ("generate/sglora.py", "library.without([e.name])", "library", GENERATED + "::test_the_condition_of_an_expert_is_made_of_others"),
    ("generate/fitting.py", "return cls(Standard.of(library), V, math.sqrt(V.shape[1] / len(V)))", "return cls(Standard.of(library), V, 1.0)", GENERATED + "::test_a_library_s_basis_holds_its_checkpoints"),
    ("generate/building.py", "dict.fromkeys([*before, *done])", "done", LIBRARY + "::test_a_library_grows"),
    ("generate/fitting.py", 'values["experts"] != _experts(library)', 'list(values["experts"]) != library.names', GENERATED + "::test_a_generator_goes_to_disk_and_back"),
    ("generate/building.py", "if told_of(recipe)[what] != shared[what]:", "if False:", LIBRARY + "::test_what_is_no_expert_is_refused_before_anything_trains"),
    ("io/files.py", "values.pop(SUM) != tensorfile.checksum(tensors)", "values.pop(SUM) is None", GENERATED + "::test_a_library_takes_one_start_alone"),
    ("cli/generating.py", "if own.get(key) != said.get(key):", "if False:", LIBRARY + "::test_experts_of_several_tasks_are_told_or_refused"),
    ("cli/generating.py", "if i % step:", "if i >= 2 * most:", GENERATED + "::test_of_many_lines_some_are_read_of_every_part_and_none_is_held_twice_over"),
    ("optim/sam.py", "(share * new + own", "(new + own", OPTIM + "::test_sam_under_a_gradient_scaler_is_sam_and_skips_what_is_not_finite_at_the_moved_factors"),
    ("optim/sam.py", "t.grad = first_g + 0 * new", "pass", OPTIM + "::test_sam_under_a_gradient_scaler_is_sam_and_skips_what_is_not_finite_at_the_moved_factors"),
    ("train/tasks/prompted.py", "(wide * there).sum(1)", "wide.sum(1)", LIBRARY + "::test_the_answer_is_the_cosine_with_the_descriptions"),
    ("jobs/course.py", "elif g.stride() == p.stride() and g.data_ptr() not in taken:", "elif True:", JOBS + "::test_alone_in_the_engine_a_job_has_the_weights_of_train"),
    ("jobs/checkpoint.py", "course.skip(job.step)", "pass", JOBS + "::test_after_a_kill_each_job_goes_on_to_the_weights_of_the_uninterrupted_one"),
    ("jobs/streams.py", "self.here = [s for s in self.every if s.name == name]", "pass", JOBS + "::test_among_others_each_job_has_the_weights_that_it_has_alone"),
    ("jobs/causal.py", "            self._see(ready)\n", "            pass\n", JOBS + "::test_where_the_first_job_cannot_begin_the_next_one_tells_how_the_model_takes_steps"),
    ("jobs/trial.py", "min(self._found(way), default", "max(self._found(way), default", "tests/oracles/test_planner.py::test_one_slow_round_decides_nothing"),
    ("jobs/trial.py", "before = next((t for t in trial.taken if t.round == self.at()), None)", "before = None", "tests/oracles/test_planner.py::test_what_was_tried_is_written_down_and_its_rounds_are_packed_as_they_were"),
    ("jobs/encoders.py", "with rows_of(self.held, names, [1] * len(names)):", "if True:", JOBS + "::test_each_classifier_has_the_head_that_it_has_alone_over_the_shared_body"),
    ("jobs/engine.py", "        if job.state != WAITING:", "        if False:", JOBS + "::test_a_job_may_be_added_before_the_others_begin_and_none_when_all_have_ended"),
    ("jobs/rounds.py", "        if is_full(error):\n            raise", "        pass", JOBS + "::test_after_a_kill_each_job_goes_on_to_the_weights_of_the_uninterrupted_one"),
    ("jobs/packing.py", "if t.next() is None]", "]", TOGETHER + "::test_what_was_tried_to_its_end_says_whether_sharing_loses"),
    ("study/together.py", "            restore(course.adapter, watch.kept)\n", "", TOGETHER + "::test_runs_made_together_have_the_figures_of_separate_ones_after_an_interruption_too"),
    ("study/together.py", "        if found.ended is None:", "        if False:", TOGETHER + "::test_a_run_that_cannot_be_made_among_others_is_made_by_itself"),
    ("jobs/beforehand.py", "        if run.model in self._lost:", "        if False:", "tests/interop/test_jobs_file.py::test_a_model_that_cannot_be_opened_is_told_once"),
    ("io/whole.py", "    if (lock := _lock(folder)) is None:", "    if (lock := _lock(folder)) == 0:", "tests/interop/test_jobs_many.py::test_one_directory_has_one_process_at_a_time"),
    ("host/modules.py", "y[at : rows.start], mine(x[rows])", "y[at : rows.stop]", READER + "::test_a_pooler_that_the_base_lacks_is_each_adapters_own"),
    ("serve/heads.py", "random += [n for n in missing if n in new]", "pass", READER + "::test_a_head_that_nobody_holds_is_refused"),
    ("serve/padded.py", "t[:, t.shape[1] - to :]", "t[:, :to]", READER + "::test_what_is_padded_on_the_left_is_cut_there"),
    ("train/several.py", "p.data = q.data", "pass", "tests/interop/test_use_several.py::test_they_share_the_base_and_say_what_each_says_alone"),
    ("io/vllm.py", "if r <= allowed:", "if r < allowed:", "tests/interop/test_vllm.py::test_the_rank_is_the_next_of_its_list_and_the_update_the_same"),
    ("serve/attention.py", "seen & (key > query - window)", "seen", BY_REQUEST),
    ("serve/attention.py", "place >= kept[:, None]", "place > kept[:, None]", BY_REQUEST),
    ("serve/attention.py", "2 * d[0] >= longest", "True", BY_REQUEST),
    ("serve/prefixes.py", "self.salts[request_id].encode()", 'b""', ENGINE + "::test_a_block_serves_the_version_that_it_was_computed_through_alone"),
    ("serve/steps.py", "and not self._adapts_head(names)", "", ENGINE + "::test_an_adapter_of_the_head_sees_every_token"),
    ("serve/steps.py", "if not off <", "if off <", BY_REQUEST + "::test_a_model_whose_layers_see_more_of_a_batch_is_refused"),
    ("serve/sampling.py", "right=True", "right=False", SAMPLING),
    ("serve/sampling.py", "before < top_p", "before < top_p / 2", SAMPLING),
    ("serve/words.py", "begun = 0 if last else", "begun = 0 if True else", WORDS),
    ("serve/words.py", "waited < LONGEST", "waited < 0", WORDS),
    ("serve/loader.py", "elif found != source.digest:", "elif False:", POOL + " -k 'random or anew'"),
    ("serve/loader.py", "source.digest is None and before != source.stamp", "False", POOL + " -k changed_since"),
    ("serve/room.py", "not (h.users or h.pinned)", "not h.pinned", POOL + " -k random"),
    ("serve/room.py", "self.ending.add(other.version.id)", "pass", POOL + " -k keep_the_room"),
    ("serve/policy.py", "max(self.spent.get(name, 0.0), self.floor)", "self.spent.get(name, 0.0)", POLICIES + " -k pause"),
    ("serve/admission.py", "+ block - 1", "", POLICIES + " -k peak"),
    ("serve/work.py", "if self.again and len(names) > 1:", "if False:", FAULTS + "::test_an_adapter_that_fails_within_a_step_ends_its_requests_alone"),
    ("serve/work.py", "if f.has_new_token and token is None:", "if False:", FAULTS + "::test_an_adapter_whose_numbers_are_not_finite_answers_nothing"),
    ("serve/work.py", "self.turns.forget(job.id)", "self.turns.active_requests.pop(job.id, None)", FAULTS + "::test_who_cancels_is_told_so_and_its_memory_is_free_while_others_go_on"),
    ("serve/sampling.py", "isinstance(given, Integral) and not isinstance(given, bool)", "True", ODD + " -k settings"),
    ("serve/owners.py", "if thread is not None and thread.is_alive():", "if False:", ODD + " -k one_engines"),
    ("host/ready.py", "held, True, True", "held, True, False", ODD + " -k nobody_else"),
    ("serve/steps.py", "if self.model.training:", "if False:", ODD + " -k dropout"),
    ("serve/work.py", "sorted(t.id for t in order) == sorted(t.id for t in waiting)", "True", ODD + " -k policy"),
    ("serve/server/keys.py", "return self.adapters is None or any(", "return True or any(", SERVED + "::test_a_key_sees_and_asks_its_adapters_alone"),
    ("serve/server/keys.py", "self.left -= count", "self.left -= 1", KEYS + "::test_a_rate_is_kept_over_any_time_however_answers_are_bundled"),
    ("serve/server/bodies.py", "if length > most:", "if length > 2 * most:", SERVED + "::test_bodies_that_are_none_are_refused_before_they_cost_anything"),
    ("serve/server/places.py", "path != root and path.is_relative_to(root) and", "path != root and", KEYS + "::test_adapters_lie_in_their_directories_and_nowhere_else"),
    ("serve/server/streams.py", "            self.gone()\n", "            pass\n", KEYS + "::test_whoever_stops_reading_ends_the_stream_and_is_let_go"),
    ("serve/server/texts.py", "seed=(how.seed + i)", "seed=(how.seed + 0 * i)", SERVED + "::test_a_chat_is_put_in_the_template_and_streams_to_the_same_answer"),
    ("serve/server/texts.py", "gone()\n        raise", "raise", SERVED + "::test_a_request_that_is_taken_in_half_is_not_taken_at_all"),
    ("serve/server/manners.py", "first = bool(self.system) and", "first = False and", SERVED + "::test_an_adapter_is_talked_to_as_it_was_trained_to_be"),
    ("serve/server/running.py", "self.served.draining = True\n        end", "end", SERVED + "::test_draining_lets_running_answers_finish_and_refuses_new_ones"),
    ("serve/server/errors.py", '"message": without_paths(said)', '"message": said', SERVED + "::test_what_the_engine_refuses_has_its_status_and_says_no_more_than_it_may"),
    ("methods/lora.py", "return alpha / r\n", "return alpha\n", METHODS),
    ("methods/lora.py", "alpha / math.sqrt(r)", "alpha / r", METHODS),
    ("methods/loran.py", "super().scale(I) / I**0.5", "super().scale(I)", METHODS),
    ("methods/loran.py", "and start.at_base", "and False", METHODS),
    ("methods/aurora.py", "and A_RI.dtype == wide(A_RI.dtype)", "", "tests/laws/test_widths.py"),
    ("io/lora_parameters.py", "B_ORE[:, :, i]", "B.reshape(B.shape[0], count, r)[:, i]", "tests/interop/test_peft_experts.py"),
    ("io/peft.py", "alphas.of(named, alpha)", "alphas.of(site, alpha)", "tests/interop/test_peft_experts.py"),
    ("host/readers.py", "reading.of_self or name in forward", "True", WEIGHTS + " -k not_taken"),
    ("host/mounted.py", "if _now.made is None:\n            return", "if True:\n            return", WEIGHTS + " -k made_once"),
    ("host/mounted.py", "class _Now(threading.local):", "class _Now:", WEIGHTS + " -k 'threads or made_once'"),
    ("host/mounted.py", "torch.is_grad_enabled(), *", "*", WEIGHTS + " -k 'gradients and LoRA'"),
    ("host/mounted.py", ".transpose(1, 2) if laws[0][0].turned", " if False", WEIGHTS + " -k 'GPT and LoRA and wherever'"),
    ("host/mounted.py", "def _update_flat_weights(self) -> None: ...", "", WEIGHTS + " -k 'LSTM or threads'"),
    ("host/mixing.py", "len(set(route.names)) > 1", "False", WEIGHTS + " -k rows_of_several"),
    ("host/readers.py", "reading.of_self or name in forward", "False", WEIGHTS + " -k wherever"),
    ("host/mounted.py", "*((id(t), t._version) for t in parts)", "*(id(t) for t in parts)", WEIGHTS + " -k changes_within"),
    ("host/state.py", "isinstance(owner, nn.RNNBase) and leaf in owner._flat_weights_names", "False", WEIGHTS + " -k list_that_it_keeps"),
    ("train/data/tags.py", 'if not self.ends or last == "E":', "if True:", "tests/oracles/test_tags.py"),
    ("train/tasks/seq2seq.py", 'return int((batch["labels"] != IGNORED).sum())', 'return len(batch["labels"])', "tests/interop/test_seq2seq.py -k accumulated"),
    ("train/tasks/similarity.py", "if text not in number:", "if True:", "tests/interop/test_similarity.py -k ranks"),
    ("train/adapter_trainer.py", "items = items.clamp(min=1)", "pass", "tests/interop/test_data_packing.py -k changes_nothing"),
    ("train/tasks/limits.py", "if empty and empty ==", "if 0 and empty ==", "tests/interop/test_data_packing.py -k refused_before"),
    ("train/tasks/token_classification.py", "if has else OUTSIDE", "if True else OUTSIDE", "tests/interop/test_tokens.py -k without_o"),
    ("train/tasks/token_classification.py", "found[:, outside] = 1.0", "found[:, -1] = 1.0", "tests/interop/test_tokens.py -k long_row"),
    ("train/trainer.py", "if run.task.has_head or run.task.mean_loss:", "if run.accumulate > 1 and run.task.has_head:", "tests/interop/test_processes.py -k twice_the_rows"),
    ("host/weights.py", "if other != path:", "if False:", WEIGHTS + " -k under_two_names"),
    ("host/checks.py", "isinstance(method, Reweight) and not method.drops", "isinstance(method, Reweight)", WEIGHTS + " -k refused_by_name"),
    ("host/rowwise.py", "linear and not (drops and layer.training)", "linear", ROUTES),
    ("host/route.py", "as_it_is = order == list(range(self.count))", "as_it_is = True", GROUPS),
    ("host/route.py", "alike = id(plain), len(rows)", "alike = id(plain), 1", GROUPS),
    ("host/rowwise.py", "if name is not None and count:", "if name is not None:", "tests/laws/test_flat_rows.py"),
    ("host/shelved.py", "every=rows == list(range(T))", "every=True", SHELF),
    ("host/shelved.py", "(gain - 1) *", "gain *", SHELF),
    ("host/shelved.py", "if row != before + 1:", "if row == -1:", SHELF),
    ("host/shelved.py", "alike.setdefault((spot.r, spot.bend,", "alike.setdefault((spot.r,", SHELF),
    ("host/mixing.py", "if n not in ready}", "if not ready}", SHELF + " -k within_another"),
    ("host/mixing.py", "if marked(layer) != shelf.marks[path]", "if False", SHELF + " -k written"),
    ("host/shelf.py", "settled is None or settled.A.numel()", "True or settled.A.numel()", SHELF + " -k settles"),
    ("host/tables.py", "self.runs[kind].give(start, n)", "pass", SHELF + " -k come_and_go"),
    ("host/tables.py", "if written > ROOM", "if False and written > ROOM", SHELF + " -k memory_goes"),
    ("host/tables.py", "longest[kind] = max(longest.get(kind, 0), n)", "longest[kind] = n", SHELF + " -k own_rank"),
    ("host/shelf.py", "uses[id(f[plain[1]])] == uses[id(f[plain[2]])] == 1", "True", SHELF),
    ("io/native.py", '{"created_by": f"undula {UNDULA}", **adapter.about}', "adapter.about", "tests/laws/test_files.py -k says"),
    ("host/state.py", "host.lock.lock.wait_for(lambda: not host.routes, PATIENCE)", "True", ROUTES + " -k verbs_wait"),
    ("host/state.py", "if r.host is self and r in self.routes", "", ROUTES + " --timeout=20 -k 'two_models or outlives'"),
    ("host/state.py", '"routes": [], "waiting": 0}', '"waiting": 0}', ROUTES + " --timeout=20 -k two_models"),
    ("host/state.py", "if again and slot.last !=", "if False and slot.last !=", ROUTES + " -k recomputation"),
    ("host/state.py", "if host.routes and (ROUTES.get() or any(", "if False and (ROUTES.get() or any(", ROUTES + " --timeout=20 -k task_of_the_same"),
    ("host/host.py", "host.forms.pop(host.selected, None)", "pass", ROUTES + " -k changes_its_rank"),
    ("core/adapter.py", "own[key].data = t.data", "pass", VALUES + " -k goes_on"),
    ("host/route.py", "if not here and not shelved and loose is None:", "if False:", ROUTES + " -k no_law"),
    ("combine/weighted.py", "{id(a): a.copy() if isinstance(a, Live) else a for _, a in terms}", "{id(a): a for _, a in terms}", VALUES),
    ("core/adapter.py", "MappingProxyType(dict(f)) for s, f", "dict(f) for s, f", VALUES),
    ("combine/weighted.py", "not 0 < weight < 1 + 1e-6", "False", VALUES),
    ("methods/sum.py", "flat.get(key, (0.0,))[0] + v", "v", VALUES),
    ("methods/sum.py", "if B_OR.shape[1] <= min(shape):", "if True:", VALUES),
    ("methods/dora.py", "shift = (1 - gain) * layer.bias", "shift = layer.bias", WEIGHT + " -k DoRA"),
    ("methods/dora.py", 'return device.type == "cpu"', "return True", "tests/laws/test_devices.py" + " -k neither"),
    ("methods/dora.py", "largest=False, sorted=False", "largest=True, sorted=False", DORA),
    ("host/rowwise.py", "if (device, *names) not in placed:", "if True:", "tests/laws/test_devices.py" + " -k mixed"),
    ("kernels/sparse.py", 'if index_K.device.type == "cpu" else [slice(0, O)]', "", "tests/laws/test_devices.py" + " -k blocks"),
    ("kernels/holes.py", 'dtype=torch.int64, device="cpu").random_()', "dtype=torch.int64).random_()", "tests/laws/test_devices.py -k users_own"),
    ("methods/dora.py", "LOST = 16", "LOST = 0", DORA),
    ("methods/dora.py", "return y if cancelled is None else", "return y if True else", DORA),
    ("methods/dora.py", "2 * (W_OI @ A_RI.T)", "W_OI @ A_RI.T", METHODS),
    ("methods/dora.py", "V_OI.detach().norm(dim=1)", "V_OI.norm(dim=1)", METHODS),
    ("methods/aurora.py", "bent = bent - self.sigma(f[\"A\"].new_zeros(1, self.r), f)", "pass", METHODS),
    ("methods/aurora.py", "torch.tanh(torch.nn.functional.linear(torch.tanh(u), H_RR))",
     "torch.nn.functional.linear(torch.tanh(u), H_RR)", METHODS),
    ("methods/aurora.py", "b_TRK.sum(-2)", "b_TRK.mean(-2)", METHODS),
    ("methods/centred.py", "torch.cat([B, -B0], 1)", "torch.cat([B, B0], 1)", LAWS + "::test_starts_at_the_base -k Centred"),
    ("methods/sum.py", "torch.cat([w * B for w, (B, _) in pairs], 1)", "torch.cat([B for w, (B, _) in pairs], 1)", LAWS + "::test_arithmetic -k RankStab"),
    ("methods/dropout.py", "return self._layer(self._x)", "return self._layer(x)", METHODS),
    ("methods/dropout.py", "x * kept(x.shape, p, x.device) * (LEVELS / (LEVELS - level))", "x * kept(x.shape, p, x.device)", METHODS),
    ("ranks/loraprune.py", "score.to(mask.device).masked_fill(~mask, -1.0)", "score.to(mask.device)", "tests/laws/test_loraprune.py"),
    ("ranks/loraprune.py", "torch.cat([A_RI - gA_RI, gA_RI])", "torch.cat([A_RI, gA_RI])", "tests/laws/test_loraprune.py"),
    ("compress/prune_base.py", "t[rows].contiguous()", "t[: len(rows)].contiguous()", "tests/laws/test_loraprune.py"),
    ("compress/updates.py", "A_RI if read is None else A_RI * read", "A_RI", SQUEEZE + "::test_inputs_that_a_mask_has_closed_are_no_part_of_the_update"),
    ("compress/bqpo.py", "block(x, *self.args, **self.kwargs)", "block(x, **self.kwargs)", "tests/laws/test_gqsa.py::test_padding_tells_nothing_whatever_it_holds"),
    ("compress/bqpo.py", "None if whole else kept", "None", "tests/laws/test_gqsa.py::test_padding_tells_nothing_whatever_it_holds"),
    ("compress/refit.py", "Q = P @ H_II * kept_OI", "Q = P @ H_II", "tests/laws/test_gqsa.py::test_what_is_kept_makes_up_for_what_goes"),
    ("compress/bqpo.py", "H_II.diagonal() if told else None", "H_II.diagonal()", "tests/laws/test_gqsa.py::test_a_layer_that_no_row_comes_to_keeps_its_largest_groups"),
    ("compress/dense_layers.py", "m is not head and n.startswith(inside)", "m is not head", "tests/laws/test_gqsa.py::test_heads_stay_dense_and_other_classes_open_what_one_has_written"),
    ("compress/squeezing.py", "if added and kernel", "if kernel", SQUEEZE + "::test_the_row_of_padding_is_in_the_norms_of_dora"),
    ("compress/gqsa.py", "up = (half.view(torch.int16) + short.to(torch.int16))", "up = half.view(torch.int16)", "tests/laws/test_gqsa.py"),
    ("compress/gqsa.py", "(q - zero[..., None])).sum(-1)", "q).sum(-1)", "tests/laws/test_gqsa.py"),
    ("kernels/attention.py", "return dP.sub_(D).mul_(P).mul_(scale)", "return dP.mul_(P).mul_(scale)", ATTENTION),
    ("kernels/attention.py", "ends = torch.arange(len(ends), device=\"cpu\") + 1", "ends = ends + 0", ATTENTION),
    ("kernels/between.py", "* p * (1.0f + v * (1.0f - p))", "* p", ATTENTION),
    ("kernels/between.py", "* inverse - UP(x[i]) * along", "* inverse", ATTENTION),
    ("kernels/between.py", "t.element_size() * i * width", "t.element_size() * width", ATTENTION),
    ("train/tasks/between.py", "w.requires_grad or w.shape", "w.shape", ATTENTION),
    ("train/tasks/between.py", "or w.shape != given[0].shape[-1:]", "", ATTENTION + " -k another_one_somewhere"),
    ("train/tasks/between.py", "product((True, False), given)", "product((False,), given)", ATTENTION + " -k another_one_somewhere"),
    ("train/tasks/between.py", "else id(v)) for k, v", "else 0) for k, v", ATTENTION + " -k another_one_somewhere"),
    ("train/tasks/between.py", "LARGE = 100.0", "LARGE = 1.0", ATTENTION + " -k another_one_somewhere"),
    ("train/tasks/segments.py", "if not HELD[id(config)]:", "if True:", SEGMENTS + " -k any_order"),
    ("train/tasks/segments.py", "sdpa is sdpa_attention_forward", "True", SEGMENTS + " -k someone"),
    ("train/tasks/step.py", "with evaluating(model):  # as", "with evaluating(model), around(model):  # as", SEGMENTS + " -k put_into"),
    ("kernels/in_c.py", "if not all(torch.allclose(t.double(), want, 1e-5, 1e-4) for t, want in found):", "if False:", "tests/laws/test_in_c.py"),
    ("kernels/in_c.py", "t.data_ptr() + 4 * i for t in blocks", "t.data_ptr() for t in blocks", "tests/laws/test_in_c.py"),
    ("train/recipe.py", "if units.has_bfloat16()", "if True", "tests/interop/test_recipe.py -k fits_the_machine"),
    ("kernels/holes.py", ".view(-1).index_copy_(0, at, only)", "", HOLES),
    ("kernels/holes.py", "at[0] += reach", "", HOLES),
    ("kernels/holes.py", "torch.mm(gz_RT, emptied(x_TI, at))", "torch.mm(gz_RT, x_TI)", HOLES),
    ("kernels/bottleneck.py", "all(t.dtype == torch.float32 for t in factors)", "False", WORK),
    ("core/method.py", "layer.training and self.plain() is not None", "True", WORK),
    ("kernels/bottleneck.py", "if ctx.needs_input_grad[0]:\n            dx = torch.mm(g_TO, W_OI).addmm_(gh_TR", "if True:\n            dx = torch.mm(g_TO, W_OI).addmm_(gh_TR", WORK),
    ("train/trainer.py", "model.disable_input_require_grads()", "pass", "tests/interop/test_training_weights.py -k again_give"),
    ("methods/activations.py", "torch.addcmul(sin, u, cos.cos_(), value=self.w, out=cos)", "sin", METHODS),
    ("methods/activations.py", "torch.sigmoid(u) - 0.5", "torch.sigmoid(u)", METHODS),
    ("kernels/bottleneck.py", ".addmm_(gh_TR, A_RI)", "", FUSED + " -k RankStab"),
    ("kernels/bottleneck.py", "dB = up(torch.mm(h_TR.t(), g_TO).t(), ctx.factors[1])", "dB = 2 * up(torch.mm(h_TR.t(), g_TO).t(), ctx.factors[1])", FUSED + " -k RankStab"),
    ("kernels/elementwise.py", "dA.addmm_(B_OR[rows].t(), dX)", "dA.addmm_(B_OR[rows].t(), G)", "tests/laws/test_kernels.py"),
    ("kernels/elementwise.py", "beta=0 if rows.start == 0 else 1", "beta=0", "tests/laws/test_kernels.py"),
    ("kernels/elementwise.py", "alpha=scale, out=F)", "alpha=1, out=F)", GRADIENTS + " -k linear-LoRAN"),
    ("kernels/spline.py", "(-1) ** i * math.comb(k + 1, i)", "math.comb(k + 1, i)", METHODS),
    ("kernels/spline.py", "cardinal(d + 0.5, ctx.k - 1)", "cardinal(d, ctx.k - 1)", GRADIENTS + " -k 'embedding-AuroRA'"),
    ("kernels/grouped.py", "x_NTI.split(list(counts))", "x_NTI.split(list(reversed(counts)))", GROUPS),
    ("host/rowwise.py", "self.order = None if order == list(range(self.count)) else", "self.order = None if True else", ROUTES + " -k grouped"),
    ("host/views.py", "return quantised.dense(self.module).flatten(1)\n", "return quantised.dense(self.module).transpose(0, 1).flatten(1)\n", WEIGHT + " -k conv-LoRA"),
    ("host/where.py", "inside = isinstance(body, nn.Module)", "inside = False", "tests/laws/test_host.py"),
    ("host/where.py", "if sides > 3:", "if False:", "tests/laws/test_volumes.py -k refused"),
    ("host/host.py", "model.requires_grad_(False)", "pass", LAWS + "::test_only_the_declared_factors_train -k 'LoRA and not TensLoRA'"),
    ("host/host.py", "p.requires_grad_(True)", "pass", "tests/laws/test_host.py"),
    ("host/merging.py", "return lost / change", "return 0.0", "tests/laws/test_host.py"),
    ("host/merging.py", "if measurable(layer):", "if False:", VALUES + " -k merge"),
    ("combine/weighted.py", "if len(orders) > 1:", "if False:", VALUES + " -k classes"),
    ("core/adapter.py", "combined([(1.0, self), (-1.0, other)])", "combined([(1.0, self), (1.0, other)])", LAWS + "::test_arithmetic -k RankStab"),
    ("host/fitting.py", "dict(model.named_parameters(remove_duplicate=False))", "dict(model.named_parameters())", FILES + "::test_a_parameter_that_is_tied_may_be_held_in_full"),
    ("host/fitting.py", "check_theirs(path, odd, adapter.apart.get(path))", "pass", LAYERS),
    ("host/apart.py", "any(d != 1 and w for d, w in", "any(d > 2 and w for d, w in", LAYERS),
    ("host/views.py", "return cls.__mro__[1] if", "return cls if", OPTIONS),
    ("host/views.py", "if layer.product and not more and not named:", "if not more and not named:", OPTIONS),
    ("host/views.py", "layer.stays(W_OI, method.weight(W_OI, f)).to(W_OI.dtype), layer.bias)",
     "layer.stays(W_OI, method.weight(W_OI, f)).to(W_OI.dtype))", OPTIONS),
    ("host/product.py", "in ((1, False), (1000, False), (1, True))", "in ((1e-6, False),)", OPTIONS),
    ("host/fitting.py", "first if first is t or torch.equal(first, t) else t", "t", SETTINGS),
    ("host/merging.py", "if len(held) > 2:", "if False:", SETTINGS),
    ("host/merging.py", "c.tie_word_embeddings = False", "pass", SETTINGS),
    ("host/slots.py", "layer.override is not None and threading.get_ident() in layer.inside", "False", "tests/laws/test_host.py"),
    ("integrations/peft/storing.py", "hosted.method.check(site(at, layer.layer), tensors)", "pass",
     "tests/interop/test_peft_disk.py"),
    ("train/restored.py", "and not same_base(own, base)", "and False", "tests/interop/test_verbs.py"),
    ("io/files.py", "if own is not None and _mark(own) != _mark(config):", "if False:", FILES + "::test_a_save_that_is_killed_anywhere_leaves_the_old_or_the_new_adapter"),
    ("io/files.py", "found.partition(MARK)[2] or None if", "MARK if", FILES + "::test_a_configuration_of_another_save_is_told"),
    ("io/draft.py", "if _locked(handle, wait=False) and", "if True and", FILES + "::test_a_draft_of_a_writer_that_lives_stays"),
    ("io/strict.py", "if len(found) < len(pairs):", "if False:", FILES + "::test_numbers_that_are_none_are_refused"),
    ("io/strict.py", "object_pairs_hook=_once, parse_constant=_constant", "object_pairs_hook=_once", FILES + "::test_what_is_no_number_is_refused_wherever_it_stands"),
    ("io/lora_config.py", "or start not in STARTS", "", FILES + "::test_starts_that_move_the_base_are_refused_by_name"),
    ("io/reading.py", "if checksums and not in_proportion(", "if False and in_proportion(", FILES + "::test_a_claim_costs_no_more_than_the_file_that_makes_it"),
    ("host/fitting.py", "method.check(where, f)", "pass", FILES + "::test_indices_outside_the_layer_are_refused"),
    ("io/files.py", "if not math.isfinite(t.sum()) and not torch.isfinite(t).all():", "if False:", DAMAGE),
    ("io/tensorfile.py", "if at != size:", "if False:", DAMAGE),
    ("io/reading.py", "raise ValueError(f\"{path} holds a tensor for", "continue\n            raise ValueError(f\"{path} holds a tensor for", DAMAGE),
    ("io/peft.py", "\"lora_alpha\": r,", "\"lora_alpha\": 2 * r,", LORA),
    ("core/choice.py", "if unknown:", "if False:", DAMAGE),
    ("host/slots.py", "if p.requires_grad or (p.ndim and p.numel())", "", DISTRIBUTED),
    ("host/around.py", "any(new <= each for each in known)", "bool(known)", DISTRIBUTED),
    ("host/slots.py", "if is_sharded(param):", "if False:", DISTRIBUTED),
    ("methods/loran.py", "torch.full((1,), values[c]", "torch.full((), values[c]", DISTRIBUTED),
    ("train/trainer.py", "arguments._n_gpu = 1", "pass", PROCESSES),
    ("train/stop.py", "[self.asked, control.should_save", "[False, control.should_save", PROCESSES),
    ("train/processes.py", "dist.all_reduce(t, dist.ReduceOp.MAX)", "pass", PROCESSES),
    ("train/processes.py", "if count() != started():", "if False:", PROCESSES),
    ("train/fit.py", "processes.by_first(lambda: claim(run, resume))", "claim(run, resume)", PROCESSES),
    ("train/trainer.py", "leaves_out(made, examples)", "False", PROCESSES),
    ("train/tasks/lending.py", "            module.eval()", "            pass", IMAGES + "::test_it_learns"),
    ("train/activations.py", "t = t.detach()", "pass", ACTIVATIONS + " -k leaves_nothing"),
    ("train/activations.py", "needed := of_largest_batch(model, examples, batch, plain)) <= ROOM * left", "needed := 0) <= ROOM * left", ACTIVATIONS + " -k need_decides"),
    ("train/activations.py", "kept[t.untyped_storage().data_ptr()] = t ", "kept[id(t)] = t ", ACTIVATIONS + " -k counted_by_storage"),
    ("train/config.py", '{"gradient_checkpointing": False, **data["run"]', '{**data["run"]', ACTIVATIONS + " -k goes_on_so"),
    ("cli/threads.py", "yield found[0] / found[1]", "pass", "tests/interop/test_threads.py -k quota"),
    ("train/data/images.py", "repr(image.size).encode() + image.tobytes()", "repr(image.size).encode()", IMAGES + "::test_every_form_of_data_gives_the_same_rows"),
    ("compress/least_squares.py", "u.movedim(layer.channel, -1)", "u", COLLAPSE),
    ("host/quantised.py", "layer.support_avx512bf16_for_cpu = False", "pass", "tests/interop/test_quantised.py::test_an_evaluation_takes_no_gradient_from_4_bit_layers"),
    ("integrations/peft/model.py", "        quantised.keep_gradients(model)\n", "", "tests/interop/test_quantised.py::test_an_evaluation_takes_no_gradient_under_peft"),
    ("methods/centred.py", "f[f\"{k}0\"].detach().clone().requires_grad_() if f\"{k}0\" in f else t for k, t in f.items()",
     "t for k, t in self.init(site).items()", AGAIN + "::test_a_start_from_data_is_kept_or_missed_by_name"),
    ("integrations/peft/starting.py", "t.data.copy_(live[at][factor])", "pass", AGAIN + "::test_a_factor_that_was_frozen_by_hand_is_the_first_adapters"),
    ("integrations/peft/undoing.py", "m._modules.update(own)", "pass", RULES + "::test_options_of_peft_that_are_not_here_say_what_to_do"),
    ("integrations/peft/layer.py", "self.pending = bool(self.missing())", "self.pending = False", AGAIN + "::test_a_configuration_used_again_starts_an_adapter"),
    ("train/adapter_trainer.py", "\"params\": moved, \"lr\": lr", "\"params\": moved", RECIPE + "::test_every_optimiser_trains_and_resumes_to_the_bit"),
    ("study/rates.py", "bracketed=tried[0] < best < tried[-1]", "bracketed=True", CHOICES),
    ("study/plan.py", "digest != self.sources.digest(rows, self.study.split_seed)", "False", STUDY),
    ("study/splits.py", "made.update(json.dumps([part, column, values]).encode())", "pass", STUDY),
    ("study/statistics.py", "math.log2(2 * comparisons / alpha)", "math.log2(comparisons / alpha)", REPORT),
    ("study/power.py", "[seeds * n for n in pooled]", "[seeds for n in pooled]", REPORT),
    ("study/store.py", "if row is not None and (row[0] != \"running\" or not", "if row is not None and (not", CHOICES),
    ("study/store.py", "where key = ? and worker = ?\", what", "where key = ?\", what[:3]", CHOICES),
    ("study/alive.py", 'if fields[0] in ("Z", "X") else', "if False else", CHOICES),
    ("study/alive.py", "min(now - last, LOOK)", "now - last", CHOICES),
    ("study/alive.py", "if (who, count) == (owner, beat) else 0.0", "", CHOICES),
    ("io/toml.py", "arrays[table] = arrays.get(table, -1) + 1", "arrays[table] = 0", CHOICES),
    ("study/summary.py", "setdefault(row.place, {})", "setdefault(row.group, {})", REPORT),
    ("study/summary.py", "if by_luck & {(row.group, row.arm), (row.group, baseline)}", "if (row.group, row.arm) in by_luck", REPORT),
    ("study/statistics.py", "rejected - 1)[rejected - 1])\n    high", "rejected)[rejected])\n    high", STATISTICS),
    ("study/cell.py", "tuple(Search(self, (s,), (s,)) for s in seeds)", "(Search(self, seeds, seeds),)", SWEPT),
    ("study/cell.py", "asked[: asked.index(trial.run.lr)]", "asked", HALVED_ALONE),
    ("study/watch.py", "if step < self.counts_from:", "if False:", COUNTS),
    ("study/watch.py", "if rung > len(rival) or behind(rival, rung):", "if rung > len(rival) or behind(rival, rung) < 0:", CHOICES),
    ("study/watch.py", "max(len(there) // reduction, 1) - 1", "len(there) // reduction", CHOICES),
    ("study/watch.py", "or found == self.best:", "or False:", LAST),
    ("study/sources.py", "made.update(file.read(BLOCK))", "pass", MODEL),
    ("study/statistics.py", "ranked.shape)), axis=2)", "ranked.shape)), axis=1)", STATISTICS),
    ("study/plan.py", "if not r.pruned or k in halved", "if True", HALVING),
    ("study/compare.py", "and f.name not in ELSEWHERE", "and f.name not in (*ELSEWHERE, 'bits')", COMPARE),
    ("train/recipe.py", "values[\"schedule\"] = Linear()", "pass", RECIPE + "::test_a_run_of_relora_that_says_no_schedule_was_trained_by_the_linear_one"),
    ("train/fields.py", "return value if hint in (int, float, torch.dtype) else", "return float(value) if hint is float and value is not None else value if hint in (int, float, torch.dtype) else", RECIPE + "::test_runs_of_studies_are_found_again_under_their_keys"),
    ("study/spec.py", "found[\"schedule\"] = None", "pass", RECIPE + "::test_relora_keeps_its_own_schedule_where_a_study_has_one_for_all"),
    ("study/sources.py", "choose(model, where, exclude)", "choose(model, where)", RECIPE + "::test_a_budget_counts_the_layers_that_an_arm_adapts"),
    ("train/prepared.py", "        exclude=run.exclude,\n", "", RECIPE + "::test_excluded_layers_stay_as_they_are"),
    ("train/trainer.py", "run.lr * run.b_ratio", "run.lr", RECIPE + "::test_loraplus_is_a_setting"),
    ("optim/optimisers.py", "\"scale_parameter\": False", "\"scale_parameter\": True", RECIPE + "::test_adafactors_step_is_the_papers"),
    ("train/trainer.py", "{\"lr\": run.lr, **constants}", "{\"lr\": run.lr}", RECIPE + "::test_every_optimiser_trains_and_resumes_to_the_bit"),
    ("methods/gated.py", "self.r if self.open is None else self.open, self.alpha", "self.r, self.alpha", GATED),
    ("methods/dylora.py", "torch.where(last, B_OR, B_OR.detach())", "B_OR", GATED),
    ("methods/dylora.py", "return [slice(0, b - 1), slice(b, r)]", "return [slice(b, r)]", GATES),
    ("ranks/prune.py", "B_OR[:, alive] / s", "B_OR[:, alive]", GATED),
    ("ranks/alora.py", "forget(self.optimizer, A_RI, rows, 0)", "pass", GATES),
    ("ranks/adalora.py", "max(1, round(how.warmup * steps))", "round(how.warmup * steps)", ADALORA),
    ("ranks/adalora.py", "self.uncertainty, now, 1 - self.how.beta2", "self.uncertainty, now, 1 - self.how.beta1", ADALORA),
    ("ranks/adalora.py", "t.copy_(tensors[n])", "pass", COURSES),
    ("ranks/sora.py", "g.grad = None", "pass", GATES),
    ("ranks/alora.py", "B_OR.index_fill_(1, rows, 0)", "pass", GATES),
    ("ranks/alora.py", "forget(self.optimizer, B_OR, rows, 1)", "pass", GATES),
    ("ranks/dylora.py", "t[ranks] = 0", "pass", GATES),
    ("ranks/dylora.py", "for t in (p, *memory)", "for t in (p,)", GATES),
    ("ranks/diffora.py", "(1 - torch.sigmoid(self.theta_N)) * along_N", "along_N", GATES),
    ("ranks/diffora.py", "self.B[i].mul_(torch.sigmoid(self.theta_N[i]))", "pass", GATES),
    ("ranks/gates.py", "torch.distributed.broadcast(there, 0)", "pass", COURSES),
    ("ranks/gates.py", "there = t.to(device)", "there = t", GATES),
    ("methods/shira.py", "self.r * (O + I), O * I", "self.r * (O + I) + 1, O * I", SPARSE),
    ("methods/shira.py", "return f[\"index\"], self.s * f[\"values\"]", "return f[\"index\"], f[\"values\"]", SPARSE),
    ("starts/masks.py", "[: k - len(above), 0]", "[-(k - len(above)) :, 0]", SPARSE),
    ("starts/masks.py", "+ (j + self.shift) % I", "+ j % I", SPARSE),
    ("kernels/frozen.py", "return number[when <= when.kthvalue(k).values]", "return number[:k]", SPARSE),
    ("kernels/sparse.py", "index_K[start:stop] - rows.start * I", "index_K[start:stop]", SPARSE),
    ("kernels/sparse.py", "beta=0 if rows.start == 0 else 1", "beta=0", SPARSE),
    ("kernels/sparse.py", "ctx.save_for_backward(z_TK, W_OI, S_OK, index_K)", "ctx.save_for_backward(z_TK, W_OI, S_OK, index_K, x_TI)", SPARSE),
    ("host/switching.py", "old.W_OI[old.at] = old.base", "pass", SPARSE),
    ("starts/channels.py", "site.once((\"S2FT\", self, block(site.name), site.shape[0 if rows else 1] // unit), order)", "order()", SPARSE),
    ("starts/channels.py", "(\"S2FT\", block(site.name))", "(\"S2FT\", site.name)", SPARSE),
    ("methods/s2ft.py", "repeat_interleave(self.unit)", "repeat(self.unit)", SPARSE),
    ("methods/lora.py", "start(site, self.r, self.scaling(self.r, self.alpha))", "start(site, self.r)", STARTS),
    ("methods/centred.py", "self.start.at_base and self.inner.starts_at_base", "False", STARTS),
    ("starts/milora.py", "sv[n - r :] / s", "sv[n - r :]", STARTS),
    ("starts/olora.py", "Q_OR.T @ W_OI", "W_OI[:r]", STARTS),
    ("starts/loraga.py", "(V[:, a].T * z)", "V[:, a].T", STARTS),
    ("starts/loraga.py", "(self.solver(site.W, r)[1] / s).sqrt().mean()", "self.solver(site.W, r)[1].sqrt().mean()", STARTS),
    ("starts/eva.py", "xx_II / n - torch.outer(mean_I, mean_I)", "xx_II / n", STARTS),
    ("starts/first_step.py", "-eta * site.gradient()", "eta * site.gradient()", STARTS),
    ("observe/probe.py", "total.div_(len(self.data))", "total", PROBE),
    ("observe/probe.py", "inputs=[anchor]", "", PROBE),
    ("observe/probe.py", "self._gradients.clear()", "pass", PROBE),
    ("observe/probe.py", "sums[name].add_(part) if name in sums else part", "part", PROBE),
    ("observe/probe.py", "return y.clone()", "return y", PROBE),
    ("observe/probe.py", "if x._version != version:", "if False:", PROBE),
    ("observe/probe.py", "self._values.pop(self._taken, None)", "pass", PROBE),
    ("observe/probe.py", "model.eval()", "pass", PROBE),
    ("observe/probe.py", "watch.begin(batch)", "pass", PROBE),
    ("observe/padding.py", "self.scopes.append(self._scope(name, module, given))", "self.scopes.append(self.scopes[-1])", "tests/oracles/test_padding.py"),
    ("observe/padding.py", "if tuple(positions) in ((mask.numel(),), (1, mask.numel())):", "if False:", "tests/oracles/test_padding.py"),
    ("compress/collapse.py", "given = widened(batch) if widen() else batch", "given = batch", COLLAPSE),
    ("kernels/svd.py", "(like.shape[1], r + max(r, oversample))", "(like.shape[1], r + oversample)", COLLAPSE),
    ("observe/probe.py", "if n == name or has_directions(layer)", "if True", PROBE),
    ("observe/probe.py", "p.requires_grad_(True)", "pass", PROBE),
    ("methods/unilora.py", "first = site.once((*self._of_all(site), \"starts\"), starts)[site.name]", "first = 0 * site.once((*self._of_all(site), \"starts\"), starts)[site.name]", FROZEN + "::test_unilora_is_an_isometry"),
    ("methods/unilora.py", "index.split([r * I, r * O])\n        return {\"scale\": scale_d, \"index_A\": index_A.view(r, I).clone(), \"index_B\": index_B.view(O, r)", "index.split([r * I, r * O])\n        return {\"scale\": scale_d, \"index_A\": index_A.view(r, I).clone(), \"index_B\": index_B.view(r, O).T", FROZEN + "::test_unilora_is_pefts"),
    ("methods/tera.py", "start = 0.0 if name == \"d1\" else self.d", "start = 0.0 if name == \"d1\" else 1.0", FROZEN + "::test_teras_diagonals_start_where_d_says_but_the_first"),
    ("methods/tera.py", "bound=math.sqrt(3 / columns)", "bound=math.sqrt(1 / columns)", FROZEN + "::test_tera_shares_its_frozen_factors"),
    ("methods/lorta.py", "of=(\"K\", here.kind)", "of=(\"K\",)", TENSOR + "::test_lorta_counts"),
    ("methods/lorta.py", "return split_ER, A_DR.T", "return split_ER.flip(0), A_DR.T", TENSOR + "::test_lorta_turned_round"),
    ("methods/blocklora.py", "alpha=self.width * self.scaling(self.r, self.alpha)", "alpha=self.alpha", TENSOR + "::test_merged_up_is_the_same_update"),
    ("methods/nola.py", "/ math.sqrt(self.l)", "/ math.sqrt(self.k)", FROZEN + "::test_nola_mixes_the_materialised_bases"),
    ("methods/vera.py", "once(\"B\", O, (O, r), r)", "once(\"B\", O, (O, r), O)", FROZEN + "::test_vera_shares_one_basis_per_size"),
    ("methods/loraxs.py", "(V_IR * s_R).T", "V_IR.T", FROZEN + "::test_lora_xs_trains_between_singular_vectors"),
    ("methods/tenslora.py", "if stacked.depth or p.layer == here.layer", "if True", TENSOR + "::test_what_is_drawn_together_is_what_there_is"),
    ("methods/_stacks.py", "\".\".join([*parts[:i], \"*\", *parts[i + 1 :]])", "\".\".join(parts[i + 1 :])", TENSOR + "::test_places"),
    ("methods/restarted.py", "return self._layer.weight + B_OK @ A_KI", "return self._layer.weight", RESTARTS + "::test_a_layer_with_a_past_is_one_layer"),
    ("starts/orthogonal.py", "return site.zeros(O, r), Q_IR.T.contiguous()", "return site.zeros(O, r), Q_IR.T.contiguous() / s", STARTS + "::test_orthogonal"),
    ("starts/pissa.py", "svd.halves(U_OR, s_R / s, V_IR)", "svd.halves(U_OR, s_R, V_IR)", STARTS + "::test_pissa_is_the_best_approximation_of_w"),
    ("penalties/wgsef.py", "slopes = torch.cat((a_g, -a_g))", "slopes = torch.cat((a_g, a_g))", "tests/laws/test_penalties.py"),
    ("penalties/proximal.py", "elif len(self.stays) != grouped.count:", "elif True:", "tests/laws/test_penalties.py"),
    ("penalties/groups.py", "if name is None or not f[name].requires_grad:", "if name is None:", "tests/oracles/test_tensor.py::test_gates_are_asked_of_methods_that_train_some"),
    ("penalties/groups.py", "yield site, f[name], torch.arange(count), ", "yield site, f[name], torch.zeros(count, dtype=torch.long), ", "tests/oracles/test_tensor.py::test_a_penalty_on_the_gates_shrinks_them_alone"),
    ("bundled/espeak.py", "for name in reversed(SPLITS):", "for name in SPLITS:", "tests/interop/test_bundled_sounds.py::test_no_sentence_is_in_two_parts"),
    ("bundled/prompts.py", "not SAID.fullmatch(text)", "not SAID.match(text)", "tests/interop/test_bundled_sounds.py::test_prompts_are_those_whose_text_is_sure"),
    ("penalties/group_lasso.py", "1 - steps / norms", "1 - steps", "tests/laws/test_penalties.py"),
    ("penalties/group_lasso.py", "return grouped.sizes.sqrt() if self.by_size", "return grouped.sizes if self.by_size", "tests/laws/test_penalties.py::test_by_size_a_step_takes_weight_times_rate_from_the_root_mean_square_of_each_group"),
    ("penalties/proximal.py", "return self.settled(steps) if self.active and self.fixed else 0", "return 0", "tests/laws/test_penalties.py::test_what_is_settled_stays_and_trains_on_without_the_penalty"),
    ("study/guess.py", "or cell.asker.key in store.rates()", "", "tests/interop/test_study_auto.py::test_a_sweep_begins_around_what_is_found_and_what_goes_on_finds_nothing_anew"),
    ("study/store.py", "insert or ignore into rates", "insert or replace into rates", "tests/interop/test_study_auto.py::test_a_dry_run_finds_nothing_and_says_what_will_be"),
    ("penalties/orthogonal_to_earlier.py", "torch.cat(those)", "those[0]", "tests/laws/test_penalties.py::test_tasks_in_sequence_keep_apart"),
    ("penalties/answers.py", "            module.training = training\n", "            pass\n", "tests/laws/test_penalties.py::test_the_teacher_is_the_base_whatever_the_start"),
    ("ranks/procedure.py", "        if not self.begun:\n            self.begun = True", "        if True:\n            self.begun = True", PROCEDURES),
    ("ranks/procedure.py", "self.begun = values.get(\"begun\", True)", "self.begun = values.get(\"begun\", False)", PROCEDURES + "::test_states_of_earlier_versions_go_on"),
    ("ranks/procedure.py", "        self._check_begun()\n        self.skipped", "        self.skipped", PROCEDURES + "::test_a_loop_without_before_forward_is_told"),
    ("ranks/together.py", "for last in (False, True)", "for last in (True, False)", PROCEDURES + "::test_the_allocator_has_the_last_word_on_gradients"),
    ("ranks/together.py", "c.step, c.skipped, c.clipped = self.step, self.skipped, self.clipped", "pass", PROCEDURES + "::test_a_procedure_with_one_that_does_nothing_is_itself"),
    ("ranks/l2sp.py", "if first[id(t)] == name", "if True", PROCEDURES + "::test_the_gradient_is_that_of_the_loss_and_the_penalty"),
    ("ranks/l2sp.py", " if p.grad is not None]", "]", PROCEDURES + "::test_what_has_no_gradient_is_passed_over"),
    ("ranks/memory.py", "if BEGAN in state and p.grad is not None:", "if BEGAN in state:", COURSES + "::test_where_the_optimiser_made_no_step_there_is_nothing_to_correct"),
    ("ranks/memory.py", "state.get(\"max_exp_avg_sq\", state[\"exp_avg_sq\"])", "state[\"exp_avg_sq\"]", COURSES + "::test_entries_that_begin_again_step_as_a_new_optimiser_would"),
    ("host/masters.py", "return dtype if dtype == torch.float64 else torch.float32", "return torch.float32", MASTERS),
    ("host/masters.py", "leaf: fn(torch.empty(0, dtype=t, device=\"cpu\")).dtype for leaf, t in self.undula_types.items()", "leaf: t for leaf, t in self.undula_types.items()", MASTERS),
    ("observe/padding.py", "return mask.T.reshape(-1) if positions == mask.T.shape else None", "return mask.reshape(-1) if positions == mask.T.shape else None", PADDING),
    ("observe/padding.py", "target = labels != IGNORED", "target = labels >= IGNORED", PADDING),
    ("optim/groups.py", "parts[-1].rpartition(\"_\")[2] == \"B\" and any(mark in parts for mark in MARKS)", "parts[-1] == \"B\" and any(mark in parts for mark in MARKS)", RULES + "::test_groups_for_loraplus"),
    ("optim/groups.py", "and any(mark in parts for mark in MARKS)", "and True", RULES + "::test_groups_for_loraplus"),
    ("optim/lorapro.py", "return free_A + X @ A, free_B - B @ X", "return free_A, free_B", OPTIM + "::test_lorapros_gradient_is_the_least_squares_optimum"),
    ("optim/lorapro.py", "damping * values.mean(-1, keepdim=True)", "damping", OPTIM + "::test_lorapros_damping_is_relative"),
    ("optim/lorapro_full.py", "return p.scale * left.T @ G, p.scale * G @ right.T", "return left.T @ G, G @ right.T", MOVES + "::test_the_full_forms_steps_are_those_of_lora_pro_adamw"),
    ("optim/lorapro_full.py", "self.state[p.B][\"step\"] = torch.zeros(())", "pass", OPTIM + "::test_narrow_parameters_train_by_wide_copies"),
    ("optim/lorsum.py", "self.state[pair.B][\"step\"] = torch.zeros(())", "pass", OPTIM + "::test_lorsum_keeps_wide_copies_of_both_factors"),
    ("optim/paired.py", "if went < length / 2:", "if False:", OPTIM + "::test_a_move_that_narrow_numbers_lose_is_refused_and_leaves_them_as_they_were"),
    ("optim/ggpo.py", "(c / self.rank**0.5)", "c", MOVES + "::test_ggpos_noise_is_the_formula"),
    ("optim/ggpo.py", "        self.steps += 1", "        pass", MOVES + "::test_ggpos_noise_is_one_of_an_update_and_none_when_measured"),
    ("optim/gorp.py", "t.copy_(was + outside(S, t - was, across))", "pass", OPTIM + "::test_a_second_task_moves_nothing_within_what_the_first_has_used"),
    ("optim/gorp.py", "self.given += [(t, t.grad) for _, t in self.matrices()]", "pass", MOVES + "::test_of_full_rank_the_projected_step_is_adams_in_the_gradients_own_directions"),
    ("optim/sam.py", "if t.grad is not None}", "if t.grad is not None and t.ndim == 2}", OPTIM + "::test_sam_moves_the_factors_of_every_method_and_puts_them_back_bit_for_bit"),
    ("optim/sam.py", "torch.as_tensor(along).clamp_max(0)", "torch.as_tensor(along)", OPTIM + "::test_without_conflict_no_step_goes_against_the_reference"),
    ("optim/optimisers.py", "    by_pairs = False\n", "", RECIPE + "::test_sams_reference_goes_with_methods_that_have_no_pairs"),
    ("optim/paired.py", "                for p, grad in self.given:\n                    p.grad = grad\n", "                pass\n", OPTIM + "::test_gradients_are_what_they_were_after_a_step"),
    ("optim/paired.py", "bare.beside[id(p)] = g if before is None else before + g", "pass", SEAMS + "::test_a_penaltys_own_gradient_is_followed_as_it_is"),
    ("optim/paired.py", "g if before is None else before + g", "g", SEAMS + "::test_a_penaltys_own_gradient_is_followed_as_it_is"),
    ("optim/perturbed.py", "is not None and computes():", "is not None:", SEAMS + "::test_what_the_base_answers_between_the_passes_moves_nothing_back"),
    ("optim/by_peft.py", "yield {**group, \"params\"", "yield {\"params\"", SEAMS + "::test_lora_fas_groups_keep_their_options_and_each_pair_a_state_of_its_own"),
    ("optim/by_peft.py", "if \"lora\" in p.site else", "if False else", SEAMS + "::test_lora_fas_groups_keep_their_options_and_each_pair_a_state_of_its_own"),
    ("train/tuning.py", "if all(abs(loss - before) <= FLAT", "if False and all(abs(loss - before) <= FLAT", "tests/interop/test_tuning.py::test_a_loss_that_no_rate_changes_has_no_rate"),
    ("integrations/callback.py", "not finite(adapter.parameters())", "False", "tests/interop/test_forget.py::test_a_request_that_has_diverged_is_not_gone_on_from"),
    ("train/forgetting_rows.py", "name == \"train\" or ", "", "tests/interop/test_forget.py::test_classes_without_rows_are_refused_before_anything_is_trained"),
    ("optim/perturbed.py", "p.copy_(found[1])", "pass", OPTIM + "::test_a_forward_without_a_backward_leaves_nothing_moved_for_evaluation"),
    ("train/begun.py", "return {} if run.begin_from is None else files", "return {} if True else files", RECIPE + "::test_a_training_goes_on_orthogonal_to_what_the_one_before_has_used"),
    ("io/kohya.py", "if \"alpha\" in leaves else len(A)", "if \"alpha\" in leaves else 1.0", "tests/interop/test_kohya.py::test_a_file_computes_what_its_formula_says"),
    ("io/kohya.py", "    called += [(f\"text_model.{name}\", name) for name in names if CLIP.fullmatch(name)]\n", "", "tests/interop/test_importing.py::test_a_text_encoder_is_called_as_others_call_it"),
    ("io/stability.py", "else at + n - 1)", "else at + n)", "tests/interop/test_kohya.py::test_names_of_stabilitys_layout_are_those_of_diffusers"),
    ("io/spots.py", "shapes[name] if name in packed else one.shape", "one.shape", "tests/interop/test_inspect.py::test_numbers_are_values_whatever_they_are_stored_as"),
    ("train/restored.py", "adapter = load_for(path, base) if needs_base(path) else adapter", "pass", "tests/interop/test_importing.py::test_what_changes_numbers_of_the_base_is_opened_with_it"),
    ("io/kohya.py", "        named[f\"{flat}.alpha\"] = torch.tensor(float(r))\n", "", "tests/interop/test_kohya.py::test_what_is_written_is_read_to_the_bit"),
    ("io/importing.py", "method.scaling(method.r, method.alpha) * b_O.float()", "b_O.float()", "tests/interop/test_peft_lora.py::test_a_bias_of_the_loras_goes_into_the_layers_own"),
    ("io/stored.py", "    if odd is not None:\n", "    if False:\n", "tests/interop/test_inspect.py::test_shards_are_one_adapter_and_their_index_is_not_trusted"),
    ("cli/shell.py", "    if text.isprintable():\n        return text\n", "    return text\n", "tests/interop/test_inspect.py::test_names_reach_a_terminal_as_text"),
    ("io/diffusers.py", "\"rank_pattern\": ranks, \"alpha_pattern\": ranks,", "\"rank_pattern\": ranks,", DIFFUSERS + "::test_what_is_written_is_read"),
    ("host/readers.py", "\"bnb\", \"fuse\", \"unfuse\")", "\"bnb\")", DIFFUSERS),
    ("io/gguf_write.py", "if not family.turned or heads is None:", "if True:", GGUF + "::test_llama_cpp_computes_what_the_model_does"),
    ("io/gguf_lora.py", "* (pair[\"lora_A\"].shape[0] / alpha)", "", GGUF + "::test_a_lora_is_an_adapter_of_llama_cpp"),
    ("io/gguf_lora.py", "t, back=True)", "t)", "tests/interop/test_importing.py::test_a_lora_of_llama_cpp_is_read_again"),
    ("io/gguf_write.py", "return (plain / stretched.double()).float()", "return None", GGUF + "::test_llama_cpp_computes_what_the_model_does"),
    ("io/gguf_words.py", "[-float(place.get(token, len(merges)))", "[float(place.get(token, len(merges)))", GGUF + "::test_llama_cpp_splits_texts_into_pieces_as_the_tokenizer"),
    ("train/asking.py", "getattr(task, role, None) or task.roles[role][0]", "task.roles[role][0]", "tests/interop/test_use_load.py -k alone_are_asked"),
    ("io/diffusers.py", "for k, v in told.items() if k.startswith(prefix)", "for k, v in told.items()", DIFFUSERS + "::test_each_part_of_a_file_has_its_own_configuration"),
    ("io/tensorfile.py", "return torch.frombuffer(raw, dtype=torch.uint8).view(entry.shape).ne(0)", "return torch.frombuffer(raw, dtype=torch.bool).view(entry.shape)", FILES + "::test_a_bool_is_one_of_two_whatever_its_byte_says"),
    ("io/draft.py", "os.chmod(self.name, stat.S_IMODE(os.stat(path).st_mode))", "pass", FILES + "::test_modes_follow_the_umask_and_the_user"),
    ("io/whole.py", "if lock is None or (lock == NO_LOCKS", "if (lock == NO_LOCKS", "tests/interop/test_verbs.py::test_folders_of_living_processes_are_left_alone"),
    ("observe/listen.py", "module.training = training", "pass", COLLAPSE + "::test_what_looks_at_a_model_leaves_its_modes_as_they_were"),
    ("observe/listen.py", "layer_known = _KnownOutput(layer, y.to(wide))", "layer_known = _KnownOutput(layer, layer(x))", COLLAPSE + "::test_a_change_is_heard_as_it_is_and_not_as_a_narrow_output_rounds_it"),
    ("host/switching.py", "if len(owners) > 1:", "if False:", SPARSE + "::test_switch_refuses"),
    ("train/data/faults.py", "len(bad) / rows > self.skip", "False", FAULTY + "::test_a_share_is_of_each_file"),
    ("train/data/source.py", "self.order[row] if self.order else row", "row", FAULTY + " -k 'left_out_and_told and items'"),
    ("train/data/tables.py", "(f\"line {line} to line {last}\", None)", "(f\"line {line} to line {last}\", key)", FAULTY + " -k 'stays_refused and swallow'"),
    ("train/tasks/limits.py", "(0 if module.padding_idx is None else module.padding_idx + 1)", "0", DATA + "::test_tables_of_positions_are_what_the_model_can_take"),
    ("train/tasks/limits.py", "*max((longest, remained), (had, kept))", "had, kept", DATA + "::test_of_cuts_the_longest_row_is_told"),
    ("train/data/conversation.py", "learned += [own and at < kept for at in range(len(made))]", "learned += [own for at in range(len(made))]", DATA + "::test_what_a_template_puts_behind_a_turns_end_is_not_learned"),
    ("train/tasks/outputs.py", "p.copy_(p.index_select(dim, torch.tensor(order, device=p.device)))", "pass", DATA + "::test_outputs_are_found_whatever_else_stands_outside_the_body"),
    ("train/tasks/generation.py", "beyond = p.cumsum(-1) - p >= self.sampling.top_p", "beyond = p.cumsum(-1) >= self.sampling.top_p", USE + "answers.py::test_draws_have_the_probabilities_that_temperature_and_top_p_give"),
    ("train/asking.py", "if role in trained or role not in task.optional}", "if True}", USE + "load.py::test_what_was_trained_on_pairs_is_asked_pairs_and_what_was_not_is_not"),
    ("train/load.py", "if missing := lacking(base):", "if missing := ():", USE + "load.py::test_what_holds_no_model_is_refused_with_what_is_there"),
    ("train/card.py", "if not there or MARK in there", "if True", USE + "colleague.py::test_a_readme_of_ones_own_stays"),
    ("cli/several.py", "            _check_no_place(rest[0])", "            pass", USE + "several.py::test_a_directory_that_is_not_there_is_no_text"),
    ("cli/predicting.py", "        check_media(given, places)", "        pass", USE + "several.py::test_files_are_no_texts_beside_others"),
    ("train/asking.py", "    _check_pairs(task, given, trained)", "    pass", USE + "load.py::test_a_pair_is_refused_where_the_training_had_none"),
    ("serve/server/places.py", "if (path / CONFIG).is_file():", "if False:", "tests/interop/test_serve_verb.py::test_a_directory_of_adapters_is_named_and_is_one"),
    ("cli/answers_out.py", "while column in taken:", "if column in taken:", USE + "verbs.py::test_a_column_of_the_rows_is_not_written_over"),
    ("cli/pushing.py", "if not NAME.fullmatch(name):", "if False:", USE + "push.py::test_what_cannot_be_a_name_is_refused"),
    ("host/merging.py", "if not error < LOST]", "if error < 0]", USE + "merge.py::test_a_merge_that_storing_swallows_is_told"),
    ("core/sketch.py", "((B_OR.mT @ B_OR) * (A_RI @ A_RI.mT)).sum()", "B_OR.square().sum() * A_RI.square().sum()", USE + "notebook.py::test_an_adapter_is_shown_as_a_table_and_a_bar_for_each_layer"),
    ("train/rows.py", "labels = [order[i] for i in rows[\"label\"][:]]", "labels = [order.index(i) for i in rows[\"label\"][:]]", DATA + " -k 'keeps_its_classes and five'"),
    ("train/doubts.py", "if p[\"result\"].get(\"groups\") and", "if not p[\"result\"].get(\"groups\") and", "tests/interop/test_penalties_training.py::test_on_the_command_line"),
    ("train/prepared.py", "        head(place)  #", "        pass  #", "tests/interop/test_penalties_training.py::test_an_earlier_adapter_that_is_not_there_is_told_before_anything_is_read"),
    ("optim/paired.py", "            if all(torch.isfinite(t).all() for p in self.pairs()", "            if any(t.numel() for p in self.pairs()", "tests/laws/test_optimisers.py::test_what_has_diverged_goes_on_as_such"),
    ("train/fit.py", "if how.active for place in how.reads", "if not how.active for place in how.reads", HONEST + "::test_a_resume_notices_what_has_changed"),
    ("train/tasks/task.py", "if left[role] == column]) > 1", "if left[role] == column]) > 9", "tests/interop/test_data_training.py::test_one_column_is_not_two_things"),
    ("io/whole.py", "_locked(parent, name, 0o700)", "_locked(parent, name)", "tests/interop/test_verbs.py::test_scratch_space_is_ones_own_and_what_a_kill_has_left_goes_with_the_next"),
    ("train/doubts.py", "last > RISEN * first + MARGIN", "last < RISEN * first - MARGIN", HONEST + "::test_doubts"),
    ("train/worries.py", "last > RAN_AWAY * max(first, math.log(2))", "last > RAN_AWAY * max(first, 1000)", HONEST + "::test_losses_that_ran_away"),
    ("study/rates.py", "(sign * alive[lr], -lr)", "(sign * alive[lr], lr)", CHOICES + "::test_of_equal_scores_the_lower_rate_wins"),
    ("study/cell.py", "scores[lr] = fmean(values) if len(values) == len(records) else None", "scores[lr] = fmean(values) if values else None", "tests/interop/test_study.py::test_a_rate_at_which_one_of_the_runs_failed_is_not_chosen"),
    ("integrations/peft/storing.py", "nn.Parameter(t.to(p.dtype, copy=True), p.requires_grad)", "nn.Parameter(t.to(copy=True), p.requires_grad)", AGAIN + "::test_tensors_of_a_narrow_file_train_wide"),
    ("integrations/peft/starting.py", "if c is given or (given.origin is not None and c.origin == given.origin):", "if c is given:", AGAIN + "::test_a_configuration_used_again_starts_an_adapter -k copy-LoRA"),
    ("io/gguf.py", 'self.few(self.arrays, "arrays in arrays")', "pass", "tests/interop/test_bundled.py::test_gguf_things_that_take_an_object_each_are_counted"),
    ("io/gguf.py", "return Numbers(kept)", "return kept.tolist()", "tests/interop/test_bundled.py::test_gguf_metadata_take_a_small_multiple_of_the_file"),
    ("observe/drawing.py", '"text.parse_math": False', '"text.parse_math": True', REPORT + "::test_texts_are_drawn_as_they_are"),
    ("study/report/latex.py", 'SPECIAL.get(c, c) for c in line', 'c for c in line', REPORT + "::test_no_text_is_latex"),
    ("study/report/plots.py", "rows if len(rows) <= NAMED else", "rows if rows else", REPORT + "::test_of_many_points_those_that_say_nothing_have_no_name"),
    ("study/report/document.py", "_filled(b) if isinstance(b, Table) else b", "b", REPORT + "::test_no_table_has_a_column_in_which_nothing_stands"),
    ("study/report/curves.py", "left + columns * (WIDTH + GAP)", "left + columns * WIDTH", REPORT + "::test_no_text_leaves_its_drawing_and_none_lies_on_another"),
    ("observe/drawing.py", "if high - low > 1e-9 * size else", "if high > low else", REPORT + "::test_rounding_alone_does_not_look_like_a_difference"),
    ("observe/drawing.py", "matplotlib.rcdefaults()", "pass", REPORT + "::test_settings_of_the_user_change_no_drawing"),
    ("kernels/cross_entropy.py", "found.masked_fill_((targets < 0)[:, None], 0.0)", "found", LABELLED + " -k kernels"),
    ("train/tasks/labelled.py", 'if not of_labels_alone(whole, batch["labels"]):', "if False:", LABELLED + " -k alone"),
    ("train/tasks/labelled.py", "LOSS = 1e-5", "LOSS = 1e-3", LABELLED + " -k slight"),
    ("train/tasks/labelled.py", 'return getattr(found, "aux_loss", None) is None and', "return", LABELLED + " -k evenly"),
    ("train/tasks/step.py", "if (off := _off(placed, counted)) > EQUAL:", "if False:", SEGMENTS + " -k half_precision"),
    ("train/tasks/step.py", "for t in (found.logits, *states)]", "for t in (found.logits,)]", SEGMENTS + " -k hide"),
    ("train/tasks/packing.py", 'key=lambda each: -len(each["input_ids"]))[:3]', 'key=lambda each: 0)[:3]', SEGMENTS + " -k long_rows"),
    ("train/tasks/packing.py", "counted = ids != self.begin - 1", "counted = ids >= 0", SEGMENTS + " -k within_a_row"),
    ("train/tasks/labelled.py", "made[0] is answer[0]", "True", LABELLED + " -k all_logits"),
    ("train/tasks/segments.py", "(self.causal if _causal(module, said) else self.full)", "True", SEGMENTS + " -k window"),
    ("train/tasks/firsts.py", "segment[0] for", "segment[-1] for", SEGMENTS + " -k first_tokens"),
    ("train/tasks/packing.py", 'for label in (IGNORED, *each["labels"][1:])', 'for label in each["labels"]', SEGMENTS + " -k rows"),
    ("train/config.py", "if version in (1, 2, 3) else {}", "if version == 1 else {}", "tests/interop/test_whole_step.py -k older"),
    ("train/adapter_trainer.py", "return losses.sum() * several / items", "return losses.mean()", "tests/interop/test_whole_step.py -k pairs"),
    ("train/tasks/packing.py", 'in made.items()}, "use_cache": False}', "in made.items()}}", PACKING + " -k cache"),
    ("train/tasks/packing.py", '(IGNORED, *example["labels"][1:])', 'example["labels"]', PACKING + " -k first_token"),
    ("host/reference.py", "        select(model, None)\n", "", PREFERENCE + "::test_the_reference_is_the_base"),
    ("train/data/preference_rows.py", 'while cut and not (', 'while cut and not (True or ', PREFERENCE + " -k within"),
    ("cli/shell.py", "            with contextlib.nullcontext() if verbose else calm():\n", "            with contextlib.nullcontext():\n", "tests/interop/test_help.py::test_what_packages_tell_their_builders_is_heard_with_verbose_alone"),
    ("cli/helping.py", "        shown.secondary_opts = []\n", "        pass\n", "tests/interop/test_help.py::test_help_is_whole_in_80_columns"),
    ("train/restored.py", "    def __repr__(self) -> str:\n", "    def told(self) -> str:\n", "tests/interop/test_help.py::test_what_a_notebook_shows_of_an_opened_run_is_short"),
    ("cli/training.py", "[: 3 if typed[\"dry_run\"] else 4]", "", "tests/interop/test_help.py::test_a_look_needs_no_place"),
    ("train/activations.py", "                p.grad = gradient\n", "                pass\n", LOOK + "::test_a_look_changes_nothing"),
    ("train/data/conversation.py", "return through[: at + len(asks)]", "return through[:at]", CHAT + " -k transformers"),
    ("train/tasks/format.py", "messages if said or not self.system", "messages if not self.system", CHAT + " -k system_prompt"),
    ("train/data/load.py", "if len(flat) > 1 or flat", "if len(flat) > 9 or False and flat", MEDIA + " -k without_classes"),
    ("train/data/audio.py", "if there < promised < STREAMED", "if False", MEDIA + " -k damaged"),
    ("train/data/decoding.py", "marked is None and not _is_utf8(path)", "marked is None", ENCODINGS + " -k shows_what_it_is"),
    ("train/evaluating.py", "        torch.set_rng_state(ours)", "        pass", "tests/interop/test_training_evaluations.py::test_what_is_kept_is_the_adapter_of_that_step_of_a_run_without_evaluations"),
    ("train/evaluating.py", "                if old != kept:", "                if True:", "tests/interop/test_training_evaluations.py::test_the_best_survives_a_kill"),
    ('train/evaluating.py', 'told["since"] = 0 if better else', 'told["since"] = 0 if finite else', 'tests/interop/test_training_evaluations.py::test_it_ends_where_none_is_better_any_more'),
    ("train/tasks/speech_recognition.py", '[length if own or "attention_mask" not in example else 0]', "[0]", "tests/interop/test_speech.py::test_answers_of_unequal_sounds_do_not_depend_on_the_batch"),
    ("train/tasks/lending.py", "if count > 1:", "if False:", "tests/interop/test_lending.py"),
    ("train/concluding.py", "    write_json(run.out / REPORT, report)\n    return report", "    return report", "tests/interop/test_training_report.py::test_a_run_is_finished_when_all_is_written"),
    ("train/tasks/weighing.py", "return (each * weight.to(each)[labels]).mean()", "return (each * weight.to(each)[labels]).sum() / weight[labels].sum()", "tests/interop/test_training_weights.py::test_accumulated_batches_are_one_batch"),
    ("train/details.py", "losses.argsort(descending=True, stable=True)", "losses.argsort(stable=True)", "tests/interop/test_training_report.py::test_figures_of_classes_are_those_of_scikit_learn"),
    ("combine/lego.py", "return svd.balanced(B_OR, A_RI)", "return B_OR, A_RI", "tests/laws/test_combine.py::test_lego_of_as_many_groups_as_ranks_is_the_sum"),
    ("combine/update.py", "torch.cat([w * B for w, (B, _)", "torch.cat([B for w, (B, _)", "tests/laws/test_combine.py::test_stacking_is_the_sum_and_taking_away_gives_the_base"),
    ("combine/regmean.py", "A_RI @ root_II, self.rank), root_II)", "A_RI, self.rank), torch.eye(len(root_II)).double())", "tests/laws/test_combine.py::test_regmean_of_a_rank_is_the_minimum_of_that_rank"),
    ("combine/consensus.py", "elected = _total(signed).sign()", "elected = _total(terms).sign()", "tests/laws/test_combine.py::test_ties_is_its_papers_whatever_the_blocks"),
    ("combine/merge.py", "t.masked_fill(t.abs() <= rounding, 0.0)", "t", "tests/laws/test_combine.py::test_no_order_counts"),
    ("combine/update.py", "t.detach().to(wide).requires_grad_(t.requires_grad)", "t.detach().to(wide)", "tests/laws/test_combine.py::test_what_trained_trains_on_in_the_combination"),
    ("combine/update.py", "return B_OR, without(A_RI, self.padding)", "return B_OR, A_RI", "tests/laws/test_combine.py::test_the_row_of_padding_is_no_part_of_an_update"),
    ("combine/weighted.py", "total.to(wide) + w * t.to(wide)", "(total + w * t).to(kind)", "tests/laws/test_combine.py::test_what_is_in_full_is_averaged_and_rounded_once"),
    ("combine/weighted.py", "if len(shapes) > 1:\n            raise ValueError(\n                f\"{n} is", "if False:\n            raise ValueError(\n                f\"{n} is", "tests/laws/test_combine.py::test_what_does_not_belong_together_is_refused"),
    ("io/peft.py", "OF_A_PARAMETER if s in parameters else THEIRS", "THEIRS", "tests/interop/test_peft_experts.py"),
    ("io/peft.py", "return name != key and name in keys", "return False", LORA + "::test_biases_that_were_trained_beside_are_read"),
    ("io/packing.py", "repeat_interleave(min(self.group, length), 1)", "repeat_interleave(self.group, 1)", "tests/laws/test_quantise.py::test_a_group_that_is_larger_than_a_row_takes_no_more_memory"),
    ("io/sites.py", "if once[0] in self.often:", "if False:", "tests/laws/test_sites.py::test_layer_by_layer_is_the_whole"),
    ("methods/fusion.py", "OPEN = 2.0", "OPEN = 1.0", "tests/laws/test_fusion.py::test_before_it_trains_it_is_the_sum"),
    ("observe/curvature.py", "return [s * (a - b) / (2 * h)", "return [(a - b) / (2 * h)", "tests/laws/test_curvature.py::test_a_product_is_the_dense_hessians"),
    ("train/trying.py", "lr if alone else lr * rate", "lr * rate", "tests/interop/test_tuning.py::test_the_test_moves_what_follows_the_rate_and_nothing_else"),
    ("train/tuning.py", "if ready.run.lr is not None:\n        return ready, None\n    if", "if ready.run.lr is not None:\n        return ready, None\n    resume = False\n    if", "tests/interop/test_tuning.py::test_a_training_finds_its_rate_writes_it_and_goes_on_with_it"),
    ("observe/regime.py", '"k": head // (heads // shared)', '"k": head % shared', "tests/oracles/test_regime.py::test_llama_with_fewer_heads_of_keys"),
    ("retrieve/sketching.py", "return (P_O @ B_OR) @ A_RI", "return (P_O @ B_OR) @ (A_RI / A_RI.norm(dim=1, keepdim=True))", "tests/laws/test_retrieve.py::test_no_gauge_changes_a_sketch"),
    ("retrieve/sketching.py", '_signs("direct", site, DIRECT)', '_signs("direct", "", DIRECT)', "tests/interop/test_find.py::test_a_file_of_diffusers_is_found_by_all_its_parts"),
    ("retrieve/places.py", "found.st_mtime_ns, found.st_ino]", "found.st_mtime_ns]", "tests/laws/test_retrieve.py::test_adapters_that_change_places_are_read_again"),
    ("retrieve/index.py", 'if told.get("sum") != tensorfile.checksum(held):', "if False:", "tests/laws/test_retrieve.py::test_a_number_that_was_damaged_is_seen"),
    ("retrieve/index.py", "m[1] > begun - YOUNG", "m[1] > begun", "tests/laws/test_retrieve.py::test_a_file_that_was_just_written_is_read_again"),
    ("retrieve/index.py", "or kept[p.name][0].mark != p.mark", "", "tests/laws/test_retrieve.py::test_an_index_reads_what_changed_and_is_what_a_new_one_would_be"),
    ("retrieve/index.py", "for i, e in enumerate(self.entries) if not e.wrong", "for i, e in enumerate(self.entries)", "tests/laws/test_retrieve.py::test_what_cannot_be_read_is_named_and_left_out"),
    ("retrieve/places.py", "there.pop(START, None)", "pass", "tests/laws/test_retrieve.py::test_what_undula_writes_beside_adapters_is_none"),
    ("retrieve/finding.py", "if spread > ALIKE else", "if spread > 0 else", "tests/laws/test_retrieve.py::test_a_result_is_ordered_by_words_by_weights_and_by_both"),
    ("retrieve/finding.py", "weights.any(1) & torch.tensor(known, dtype=torch.bool)", "weights.any(1)", "tests/laws/test_retrieve.py::test_a_result_is_ordered_by_words_by_weights_and_by_both"),
    ("cli/finding.py", "raise typer.Exit(1)", "pass", "tests/interop/test_find.py::test_what_cannot_be_read_is_named_and_the_exit_code_says_so"),
    ("cli/gating.py", "values = [replace(a, full={}) for a in values]", "pass", "tests/interop/test_combine.py::test_heads_are_left_behind_the_gates_where_that_is_asked"),
]  # fmt: skip


def applied(number: int, copy: Path) -> None:
    """Makes the mutant in the copy."""
    name, old, new, _ = MUTANTS[number]
    path = copy / "undula" / name
    source = path.read_text(encoding="utf-8")
    if source.count(old) != 1:
        sys.exit(f"mutant {number}: {name} holds {old!r} {source.count(old)} times; bring the mutant up to date")
    path.write_text(source.replace(old, new), encoding="utf-8")


def failing(tests: str, copy: Path) -> str | None:
    """The first of the tests that fails with the sources in the copy, in a fork of this process."""
    log = copy / "log"
    child = os.fork()
    if child == 0:
        with log.open("w", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.path.insert(0, str(copy))
        for name in [m for m in sys.modules if m.partition(".")[0] in ("undula", "tests")]:
            del sys.modules[name]  # conftest loads the sources as they are: without this every mutant would survive
        os.environ["PYTHONPATH"] = str(copy)  # of processes that tests start
        options = ["-x", "-q", "--all-cases", "-p", "no:cacheprovider", "-o", "timeout=300"]
        with contextlib.suppress(BaseException):
            os._exit(pytest.main([*options, *shlex.split(tests)]))
        os._exit(70)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = log.read_text(encoding="utf-8")
    if code not in (0, 1):
        sys.exit(f"the tests {tests} did not run:\n{said[-4000:]}")
    found = re.search(r"^(?:FAILED|ERROR) \S+?::(\w+)", said, re.MULTILINE)
    return None if code == 0 else found[1] if found else "?"


def chosen(words: list[str]) -> list[int]:
    """The numbers of the mutants that the command line asks for."""
    return [
        i
        for i, (name, *_) in enumerate(MUTANTS)
        if not words or any(w == str(i) or not w.isdigit() and name.startswith(w) for w in words)
    ]


def main() -> None:
    os.chdir(ROOT)
    sys.path[0] = str(ROOT)
    for name in ("tests.conftest", "datasets", "peft", "transformers"):  # the first says with how many threads
        importlib.import_module(name)
    numbers = chosen(sys.argv[1:])
    alive = []
    with tempfile.TemporaryDirectory() as folder:
        sound = Path(folder) / "sound"
        shutil.copytree(ROOT / "src/undula", sound / "undula")
        wanted = dict.fromkeys(MUTANTS[i][3] for i in numbers)
        for tests in (" ".join(t for t in wanted if " -k " not in t), *(t for t in wanted if " -k " in t)):
            if tests and (found := failing(tests, sound)):
                sys.exit(f"without any mutant {found} fails:\n{(sound / 'log').read_text(encoding='utf-8')[-4000:]}")
        sys.dont_write_bytecode = True  # of a mutant; what the sound sources were compiled to serves the rest
        for number in numbers:
            start, copy = time.time(), Path(folder) / str(number)
            shutil.copytree(sound, copy)
            applied(number, copy)
            name, old, new, tests = MUTANTS[number]
            by = failing(tests, copy)
            alive += [number] * (by is None)
            verdict = f"killed by {by}" if by else "SURVIVED"
            print(
                f"{number:3} {time.time() - start:4.0f} s  {name}: {old[:40]!r} -> {new[:30]!r}: {verdict}", flush=True
            )
            shutil.rmtree(copy)
    print(f"{len(numbers) - len(alive)} of {len(numbers)} mutants killed")
    sys.exit(bool(alive))


if __name__ == "__main__":
    main()
