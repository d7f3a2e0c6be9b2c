"""The museum of bugs: ways in which implementations of these methods go wrong, each as a patch of a
few lines on a file of ours and the test that must fail with it.

    python tests/mistakes.py    writes lessons/museum.md anew
"""

import ast
import contextlib
import io
import linecache
import os
import sys
import types
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent


class Mistake(NamedTuple):
    name: str  # what the learner did, in the second person
    file: str  # "simclr.py"
    function: str  # "nt_xent", "Class.method", or "train"
    old: str  # occurs exactly once in that function's source
    new: str
    test: str  # "tests/test_simclr.py::test_name", which must fail
    saw: str  # what one saw
    record: str  # "owner/repository#number", a commit or a paper; "": none found


SIMCLR, MOCO, BYOL, DINO, IBOT, DINOV2, PRETEXT, WEAK, COMMON = (
    f"tests/test_{name}.py::"
    for name in "simclr moco byol dino ibot dinov2 pretext weak common".split())

MISTAKES = [
    # ---- simclr.py -------------------------------------------------------------------------------
    Mistake("your loss counts each view's similarity with itself", "simclr.py", "nt_xent",
            "    s.fill_diagonal_(-math.inf)  # k != i\n", "",
            SIMCLR + "test_nt_xent_equation",
            "e^(1/tau) outweighs the other terms of the denominator, and the gradient is small.",
            "Lightning-Universe/lightning-bolts#609"),
    Mistake("your loss takes a neighbouring row for the positive", "simclr.py", "nt_xent",
            ".roll(len(z1))", ".bitwise_xor(1)",
            SIMCLR + "test_nt_xent_equation",
            "Different images were pulled together; the maintainers saw it in their training logs.",
            "open-mmlab/mmselfsup#159"),
    Mistake("your loss leaves the positive out of the denominator", "simclr.py", "nt_xent",
            "return F.cross_entropy(s, j)",
            "s_pos = s.gather(1, j[:, None])[:, 0]\n"
            "    return (s.scatter(1, j[:, None], -math.inf).logsumexp(1) - s_pos).mean()",
            SIMCLR + "test_nt_xent_equation",
            "The loss falls below 0 and pulls on pairs that are close already. It is the loss "
            "of decoupled contrastive learning (arXiv 2110.06848).",
            "danielward27/flowjax#164"),
    Mistake("your loss takes negatives from the other view only", "simclr.py", "nt_xent",
            "    s.fill_diagonal_(-math.inf)  # k != i\n",
            "    s[: len(z1), : len(z1)] = s[len(z1) :, len(z1) :] = -math.inf\n",
            SIMCLR + "test_nt_xent_equation",
            "Where nothing is learned the loss is ln N, not ln(2N - 1). MoCo v3 (arXiv 2104.02057) "
            "has this loss.",
            "catalyst-team/catalyst#1278"),
    Mistake("your loss takes only one view of each image as anchor", "simclr.py", "nt_xent",
            "F.cross_entropy(s, j)", "F.cross_entropy(s[: len(z1)], j[: len(z1)])",
            SIMCLR + "test_nt_xent_equation",
            "Half of the gradient is missing, and the loss changes when the views are swapped.",
            "tensorflow/similarity#262"),
    Mistake("your loss divides by the temperature squared", "simclr.py", "nt_xent",
            "z.T / tau ", "z.T / tau**2 ",
            SIMCLR + "test_nt_xent_equation",
            "The best temperature seems to be the square root of the paper's.", ""),
    Mistake("your loss multiplies the result by a temperature", "simclr.py", "nt_xent",
            "return F.cross_entropy(s, j)", "return F.cross_entropy(s, j) * tau / 0.07",
            SIMCLR + "test_nt_xent_equation",
            "Equal embeddings do not give ln(2N - 1), and tau changes the effective learning rate.",
            "HobbitLong/SupContrast#106"),
    Mistake("your loss does not normalise the embeddings", "simclr.py", "nt_xent",
            "F.normalize(torch.cat([z1, z2]), dim=1)", "torch.cat([z1, z2])",
            SIMCLR + "test_nt_xent_equation",
            "A reader asked for the reason: the loss can fall because vectors grow.",
            "Link-Li/CLMLF#3"),
    Mistake("your loss normalises the batch as one vector", "simclr.py", "nt_xent",
            "F.normalize(torch.cat([z1, z2]), dim=1)", "F.normalize(torch.cat([z1, z2]), dim=None)",
            SIMCLR + "test_nt_xent_equation",
            "The loss stays high, even on a single batch.", "tensorflow/similarity#237"),
    Mistake("your loss takes the logarithm of a mean, not the mean of logarithms", "simclr.py",
            "nt_xent",
            "return F.cross_entropy(s, j)",
            "return -s.softmax(1).gather(1, j[:, None]).mean().log()",
            SIMCLR + "test_nt_xent_equation",
            "Easy images get the gradient, hard ones hardly any.", ""),
    Mistake("your loss overflows, as it computes exponentials directly", "simclr.py", "nt_xent",
            "return F.cross_entropy(s, j)",
            "e = s.exp()\n    return -(e.gather(1, j[:, None])[:, 0] / e.sum(1)).log().mean()",
            SIMCLR + "test_nt_xent_closed_forms",
            "At a temperature of 0.01 the program stopped: 2.7e43 is too large for a float.",
            "Lightning-Universe/lightning-bolts#811"),
    Mistake("your negatives come from one process only", "simclr.py", "train",
            "nt_xent(run.gather(z1), run.gather(z2), ", "nt_xent(z1, z2, ",
            SIMCLR + "test_negatives_of_all_processes",
            "More GPUs do not help: each has its own small batch.",
            "Lightning-Universe/lightning-bolts#179"),
    Mistake("you concatenate the two views before you gather them", "simclr.py", "train",
            "nt_xent(run.gather(z1), run.gather(z2), ",
            "nt_xent(*run.gather(torch.cat([z1, z2])).chunk(2), ",
            SIMCLR + "test_negatives_of_all_processes",
            "With more than one GPU the loss fell, but no useful features came of it.",
            "Spijkervet/SimCLR#37"),
    Mistake("you feed the same view twice", "simclr.py", "train",
            "torch.cat([x1, x2])", "torch.cat([x1, x1])",
            SIMCLR + "test_algorithm_1_is_what_runs",
            "Positives agree from the first step on, and nothing is learned from them.", ""),
    Mistake("your cosine schedule has the wrong length", "simclr.py", "lr_at",
            "math.pi * (step - warmup)", "3 * math.pi * (step - warmup)",
            SIMCLR + "test_lr_at",
            "T_max was in batches, but step() ran per epoch: the cosine did not end with the run.",
            "sthalles/SimCLR#43"),
    Mistake("your LARS adapts and decays biases too", "simclr.py", "LARS.step",
            " if p.ndim > 1]", "]",
            SIMCLR + "test_lars_equation",
            "Biases start at 0, so their steps are next to nothing.", "vturrisi/solo-learn#301"),
    # ---- moco.py ---------------------------------------------------------------------------------
    Mistake("your logits lack the temperature", "moco.py", "info_nce",
            "torch.cat([l_pos, l_neg], dim=1) / tau", "torch.cat([l_pos, l_neg], dim=1)",
            MOCO + "test_info_nce_equation",
            "The loss hardly leaves its chance value.", ""),
    Mistake("your keys get a gradient", "moco.py", "info_nce",
            "k.detach()", "k",
            MOCO + "test_info_nce_equation",
            "The key encoder is trained as well, and the queue's keys are soon out of date.", ""),
    Mistake("your key encoder's update swaps m and 1 - m", "moco.py", "ema_update",
            "1 - m,", "m,",
            MOCO + "test_ema_update",
            "The key encoder jumps to the query encoder: the keys of a queue do not fit together.",
            ""),
    Mistake("your queue holds the positives when it is read", "moco.py", "train",
            "            q, k = F.normalize(q.float()), F.normalize(k.float())\n",
            "            q, k = F.normalize(q.float()), F.normalize(k.float())\n"
            "            dequeue_and_enqueue(queue, ptr, k)\n",
            MOCO + "test_algorithm_1",
            "The loss cannot fall below ln 2: every positive is among the negatives.", ""),
    Mistake("your queue's pointer does not wrap round", "moco.py", "dequeue_and_enqueue",
            "(ptr + torch.arange(len(k), device=k.device)) % queue.shape[1]",
            "(ptr + torch.arange(len(k), device=k.device)).clamp(max=queue.shape[1] - 1)",
            MOCO + "test_queue",
            "It works as long as the batch size divides the queue size.",
            "ckldan520/DDGCL#3"),
    Mistake("your queue's pointer stays where it is", "moco.py", "dequeue_and_enqueue",
            "return (ptr + len(k)) % queue.shape[1]", "return ptr",
            MOCO + "test_queue",
            "All but one batch of the negatives stay random.", ""),
    Mistake("your batch norm takes its statistics from the whole batch", "moco.py",
            "SplitBatchNorm2d.forward",
            "if not self.training:", "if self.splits:",
            MOCO + "test_split_batch_norm",
            "Shuffling did nothing in one process: query and key had the same statistics.",
            "HobbitLong/CMC#39"),
    Mistake("you do not shuffle the keys' images", "moco.py", "train",
            "permutation(args, step, run.device)", "torch.arange(N, device=run.device)",
            MOCO + "test_algorithm_1",
            "Shuffling improved the accuracy on CIFAR-10.",
            "lightly-ai/lightly#18"),
    Mistake("you do not put shuffled keys back in order", "moco.py", "encode_shuffled",
            "run.gather(k)[order.argsort()]", "run.gather(k)",
            MOCO + "test_encode_shuffled",
            "The positive of a query was the key of another image.", "CoinCheung/DenseCL#1"),
    Mistake("your positives are those of the first process everywhere", "moco.py", "train",
            "k.chunk(run.world)[run.rank]", "k[: len(q)]",
            MOCO + "test_positives_of_the_second_process",
            "There it was a mask of the positives: a second GPU used that of the first one.",
            "vturrisi/solo-learn#206"),
    Mistake("your keys come from the query encoder", "moco.py", "train",
            "encode_shuffled(f_k, x_k, order, run)",
            "encode_shuffled(f_q, x_k, order, run).detach()",
            MOCO + "test_algorithm_1",
            "As with m = 0: training does not converge; here the loss stays at chance.",
            "arXiv:1911.05722"),
    # ---- byol.py ---------------------------------------------------------------------------------
    Mistake("your target gets a gradient", "byol.py", "byol_loss",
            "z.detach() if stop_gradient else z", "z",
            BYOL + "test_byol_loss_equation",
            "The loss drops to its minimum at once, and all images have the same embedding.",
            "arXiv:2011.10566"),
    Mistake("your loss does not normalise the target", "byol.py", "byol_loss",
            "F.normalize(z, dim=1)", "z",
            BYOL + "test_byol_loss_equation",
            "The loss grows with the length of the embeddings.", ""),
    Mistake("your target's update swaps m and 1 - m", "byol.py", "ema_update",
            "1 - m,", "m,",
            BYOL + "test_ema_update",
            "The target is nearly the online network itself.", ""),
    Mistake("your target never follows", "byol.py", "train",
            "            ema_update(net_ema, net, torch.where(ok, m, 1.0))"
            "  # EMA: xi = m xi + (1 - m) theta\n", "",
            BYOL + "test_algorithm",
            "The function was there, but nothing called it: the target stayed as it began.",
            "PatrickHua/SimSiam#26"),
    Mistake("your target's update leaves out its biases", "byol.py", "ema_update",
            "list(net_ema.parameters()), list(net.parameters())",
            "*([p for p in f.parameters() if p.ndim > 1] for f in (net_ema, net)),",
            BYOL + "test_ema_update",
            "Biases and batch norm of the target stay as they began.",
            "Lightning-Universe/lightning-bolts#440"),
    Mistake("your target has a predictor", "byol.py", "train",
            "_, z, _ = target(x1, x2)", "_, _, z = target(x1, x2)",
            BYOL + "test_algorithm",
            "Both networks share a head, a reader found; in the paper, predictors are not shared.",
            "open-mmlab/mmselfsup#22"),
    Mistake("your prediction is compared with the target of its own view", "byol.py", "train",
            "byol_loss(p1, z2,", "byol_loss(p1, z1,",
            BYOL + "test_algorithm",
            "The loss looks right, but there is no other view to be invariant to: k-NN is worse.",
            "The-AI-Summer/byol-cifar10#1"),
    Mistake("your momentum does not rise", "byol.py", "m_at",
            "return 1 - (1 - m) * (math.cos(math.pi * step / steps) + 1) / 2", "return m",
            BYOL + "test_m_at",
            "The validation loss at the end was far from that with a momentum that rises.",
            "lucidrains/byol-pytorch#82"),
    Mistake("your momentum schedule has the wrong number of steps", "byol.py", "m_at",
            "math.pi * step / steps", "math.pi * min(5 * step / steps, 1)",
            BYOL + "test_m_at",
            "tau was 1 after a few epochs, and from then on the target stood still.",
            "vturrisi/solo-learn#286"),
    Mistake("your target is in eval mode", "byol.py", "train",
            "net_ema.requires_grad_(False)", "net_ema.requires_grad_(False).eval()",
            BYOL + "test_algorithm",
            "Its batch norm uses running statistics, which nothing has ever updated.", ""),
    # ---- dino.py ---------------------------------------------------------------------------------
    Mistake("you subtract the centre from the student", "dino.py", "dino_loss",
            "F.log_softmax(s / tau_s, dim=1)", "F.log_softmax((s - center) / tau_s, dim=1)",
            DINO + "test_dino_loss_equation",
            "What the centre takes from the teacher, it also takes from the student.",
            ""),
    Mistake("your student is compared with the teacher on its own view", "dino.py", "dino_loss",
            "t_sum - t[j] if j < len(t) else t_sum", "t_sum",
            DINO + "test_dino_loss_equation",
            "The loss falls further, and the features are poorer.", ""),
    Mistake("your teacher gets a gradient", "dino.py", "dino_loss",
            "view.detach()", "view",
            DINO + "test_dino_loss_equation",
            "Teacher and student move towards each other, until both are constant.", ""),
    Mistake("your centre's update swaps m and 1 - m", "dino.py", "update_center",
            "m * center + (1 - m) * teacher", "(1 - m) * center + m * teacher",
            DINO + "test_center",
            "The centre jumps with each batch, and so does the teacher's entropy.", ""),
    Mistake("your centre comes from the student's outputs", "dino.py", "train",
            "run.mean(t.mean(0", "run.mean(s.detach().mean(0",
            DINO + "test_algorithm_1",
            "The teacher's outputs are not centred, and one of them takes over.", ""),
    Mistake("your centre is the mean of probabilities", "dino.py", "train",
            "run.mean(t.mean(0", "run.mean(F.softmax(t, dim=1).mean(0",
            DINO + "test_algorithm_1",
            "The centre stays near 0, as with --no-centering.", ""),
    Mistake("you update the centre before the loss", "dino.py", "train",
            "            s, t = s.float(), t.float()\n",
            "            s, t = s.float(), t.float()\n"
            "            center.copy_(update_center(center, t.mean(0, keepdim=True), center_m))\n",
            DINO + "test_algorithm_1",
            "The centre knows the batch that it is subtracted from.", ""),
    Mistake("your teacher sees local views", "dino.py", "train",
            "teacher(*x[:2])  # (2N, K), the global ones\n            s, t = s.float(), t.float()\n"
            "            loss = dino_loss(s.chunk(len(x)), t.chunk(2),",
            "teacher(*x)\n            s, t = s.float(), t.float()\n"
            "            loss = dino_loss(s.chunk(len(x)), t.chunk(len(x)),",
            DINO + "test_flags_change_the_algorithm[--local-crops 3-no local views]",
            "Global views have to predict the output for a local one, which shows less.", ""),
    Mistake("your teacher drops paths", "dino.py", "train",
            "net_ema = build(args)", "net_ema = build(args, args.drop_path)",
            DINO + "test_the_teacher_drops_no_paths",
            "The teacher's outputs are random; the fix was to freeze it and put it in eval mode.",
            "lightly-ai/lightly-train#111"),
    Mistake("your teacher's temperature is that of the next step", "dino.py", "tau_at",
            "step / (warmup * steps)", "(step + 1) / (warmup * steps)",
            DINO + "test_tau_at",
            "Nothing: a shift by one step is too small to see when runs are compared.", ""),
    Mistake("you freeze the last layer of the teacher", "dino.py", "train",
            "net.head.last_layer.zero_grad()", "net_ema.head.last_layer.zero_grad()",
            DINO + "test_flags_change_the_algorithm"
            "[--freeze-last-layer 1-decay of the frozen layer]",
            "The teacher has no gradient to cancel, and the student's layer is not frozen.",
            "lightly-ai/lightly#1596"),
    Mistake("your last layer never thaws", "dino.py", "train",
            "if epoch < args.freeze_last_layer:", "if args.freeze_last_layer:",
            DINO + "test_the_last_layer_thaws",
            "The loss stops falling early: the outputs are those of a random layer.", ""),
    Mistake("you let weight decay act on biases and norms", "dino.py", "train",
            "zip(optimizer.param_groups, (wd, 0.0))", "zip(optimizer.param_groups, (wd, wd))",
            DINO + "test_algorithm_1",
            "The gains of layer norms shrink when the decay rises to 0.4.",
            "vturrisi/solo-learn#289"),
    Mistake("you resize the positions by a factor that is rounded down", "dino.py", "resample",
            "((height + 0.1) / side, (width + 0.1) / side)", "(height / side, width / side)",
            DINO + "test_resampled_positions",
            "At some sizes one row or column is missing and the program stops.",
            "facebookresearch/dino#8"),
    # ---- ibot.py ---------------------------------------------------------------------------------
    Mistake("you weight all hidden patches equally, not all images", "ibot.py", "patch_loss",
            "((losses * mask).sum(1) / hidden).mean()", "(losses * mask).sum() / mask.sum()",
            IBOT + "test_patch_loss_equation",
            "Released codebases differ here, and a reader could not tell which follows the paper.",
            "facebookresearch/dinov3#302"),
    Mistake("your processes all hide the same patches", "ibot.py", "draw_masks",
            "[run.rank]", "[0]",
            IBOT + "test_draw_masks",
            "With two processes, an image gets a different mask than with one.", ""),
    Mistake("your loss is on the visible patches", "ibot.py", "patch_loss",
            "(losses * mask)", "(losses * ~mask)",
            IBOT + "test_patch_loss_equation",
            "The loss falls at once: the answer is in the input.", ""),
    Mistake("your loss lets visible patches outweigh the hidden ones", "ibot.py", "patch_loss",
            "((losses * mask).sum(1) / hidden).mean()", "losses.mean()",
            IBOT + "test_patch_loss_equation",
            "The model concentrated on the easy, visible patches and got worse.",
            "lightly-ai/lightly#1937"),
    Mistake("your patches are compared with those of the other view", "ibot.py", "ibot_loss",
            "zip(s_patch, t_patch, masks)", "zip(s_patch, t_patch[::-1], masks)",
            IBOT + "test_ibot_loss_equation",
            "Patch i of another crop shows another place, so there is nothing to predict.", ""),
    Mistake("your teacher sees the mask", "ibot.py", "train",
            "teacher(*x[:2], with_patches=True)", "teacher(*x[:2], masks=masks, with_patches=True)",
            IBOT + "test_algorithm_1",
            "Nobody knows what is under the mask, and the patch loss stays high.", ""),
    Mistake("your student sees everything", "ibot.py", "train",
            "student(*x, masks=masks, ", "student(*x, masks=None, ",
            IBOT + "test_algorithm_1",
            "The masks were drawn but not handed to the student: the patch loss falls at once.",
            "lightly-ai/lightly-train#111"),
    Mistake("your mask tokens have no positions", "ibot.py", "IBOT.masked_tokens",
            "x = torch.where(masks.unsqueeze(1), embed, x)",
            "p = self.backbone.pos_embed[:, 1:].mT.unflatten(2, x.shape[2:])\n"
            "            x = torch.where(masks.unsqueeze(1), embed - p, x)",
            IBOT + "test_hidden_patches_have_no_influence",
            "The answer is the same for all hidden patches of an image.", ""),
    # ---- dinov2.py -------------------------------------------------------------------------------
    Mistake("your Sinkhorn-Knopp ends with the columns", "dinov2.py", "sinkhorn_knopp",
            "    return Q.exp_()", "    Q -= Q.logsumexp(0, keepdim=True)\n    return Q.exp_()",
            DINOV2 + "test_sinkhorn_equation",
            "The targets of an image do not sum to 1, and the loss has another scale.", ""),
    Mistake("your Sinkhorn-Knopp overflows", "dinov2.py", "sinkhorn_knopp",
            "Q = logits.detach() / tau", "Q = (logits.detach() / tau).exp().log()",
            DINOV2 + "test_sinkhorn_is_finite",
            "NaN at a temperature of 0.04, as soon as an output is over 3.5.",
            "facebookresearch/dinov2#583"),
    Mistake("your Sinkhorn-Knopp balances each process alone", "dinov2.py", "sinkhorn_knopp",
            "gather(columns).logsumexp(0, keepdim=True) if gather else columns", "columns",
            DINOV2 + "test_sinkhorn_of_two_processes",
            "With few images per GPU, all prototypes are forced upon them.", ""),
    Mistake("your KoLeo term takes an image for its own neighbour", "dinov2.py", "koleo",
            ".detach().fill_diagonal_(-2.0)", ".detach()",
            DINOV2 + "test_koleo_equation",
            "The term is a constant, set by its two 1e-8, and has no gradient.", ""),
    Mistake("your KoLeo term takes the other view for a neighbour", "dinov2.py", "train",
            "sum(koleo(view) for view in h.chunk(len(x))[:2])", "2 * koleo(h[: 2 * len(x[0])])",
            DINOV2 + "test_algorithm",
            "It drives the two views of an image apart, against the loss.", ""),
    Mistake("your patches include the registers", "dinov2.py", "DINOv2.forward",
            "x[:, 1 + self.backbone.registers :]", "x[:, 1:]",
            DINOV2 + "test_hidden_patches[--registers 2 --tied-heads]",
            "In networks with registers, the mean over patches had four tokens too many.",
            "huggingface/transformers#37817"),
    Mistake("you divide the patches' centre by the wrong number", "dinov2.py", "mean_of_all",
            "(sums[:-1] / sums[-1].clamp(min=1))", "sums[:-1]",
            DINOV2 + "test_mean_of_all",
            "The centre was a sum over patches: it was divided by the length of a dimension of 1.",
            "facebookresearch/dinov2#546"),
    # ---- pretext.py ------------------------------------------------------------------------------
    Mistake("your labels and turned images differ in order", "pretext.py", "rotate",
            ".repeat_interleave(len(images))", ".repeat(len(images))",
            PRETEXT + "test_four_rotations_are_the_identity",
            "Accuracy stays at 25 %.", ""),
    # ---- common.py -------------------------------------------------------------------------------
    Mistake("your gather cuts the gradient off", "common.py", "Run.gather",
            "x + (self.world - 1) * (x - x.detach())", "x.detach()",
            COMMON + "test_gather_keeps_the_gradient",
            "On several GPUs the loss does not fall.", "KevinMusgrave/pytorch-metric-learning#10"),
    Mistake("your gather keeps only a part of the gradient", "common.py", "Run.gather",
            "x + (self.world - 1) * (x - x.detach())", "x",
            COMMON + "test_gather_keeps_the_gradient",
            "Two GPUs do not learn like one with the same batch.", "facebookresearch/vissl#123"),
    Mistake("you draw once for the whole batch", "common.py", "coin",
            "torch.rand(len(x), 1, 1, 1, device=x.device) < p",
            "(torch.rand(1, device=x.device) < p).expand(len(x), 1, 1, 1)",
            COMMON + "test_every_image_has_its_own_draw[flip]",
            "Fewer kinds of views than you think; with NumPy, every worker draws the same ones.",
            "pytorch/pytorch#5059"),
    Mistake("your k-NN has the test images in its bank", "common.py", "knn",
            "x, y = fit if test is None else [", "x, y = [",
            COMMON + "test_knn",
            "Accuracies near 100 %: the nearest neighbour is the image itself.", ""),
    Mistake("you choose the penalty on the test images", "simclr.py", "linear_probe",
            "return next(regression_path(*both, *test, [best]))",
            "return max(regression_path(*both, *test, penalties))",
            COMMON + "test_linear_probe",
            "After the fix one of three published figures was lower.",
            "hengruizhang98/CCA-SSG#2"),
    Mistake("you extract features in train mode", "simclr.py", "evaluate",
            "    net.eval()\n", "    net.train()\n",
            SIMCLR + "test_features_are_those_of_eval_mode",
            "Results change with the batch; in one case, batch norm's statistics changed, too.",
            "kdexd/virtex#16"),
    Mistake("your failed step stays in batch norm's statistics", "common.py", "Undo.__call__",
            "            live.copy_(good)\n", "",
            COMMON + "test_update_skips_what_is_not_finite[input-sgd]",
            "One NaN, skipped by the optimiser, and every later evaluation is NaN.", ""),
    # ---- weak.py ---------------------------------------------------------------------------------
    Mistake("your label model takes a vote for class 0 as an abstention", "weak.py", "posterior",
            "1 + vote]", "1 + torch.where(vote == 0, -1, vote)]",
            WEAK + "test_posterior_equation",
            "Classes had to be counted from 1, while answers were counted from 0.",
            "snorkel-team/snorkel#1093"),
    Mistake("your sources cannot be worse than chance", "weak.py", "triplets",
            "size * E.nansum(1).sign()", "size",
            WEAK + "test_triplets",
            "A source that is wrong more often than right is trusted as if it were right.", ""),
    Mistake("your attention gives weight to padding", "weak.py", "attention_pool",
            ".masked_fill(~mask, -math.inf)", "",
            WEAK + "test_attention_pool_equation",
            "Weights of a bag depend on how long the longest one in the batch is.",
            "jamesmullenbach/caml-mimic#13"),
    Mistake("your loss counts padding as images", "weak.py", "bag_loss",
            "(losses * mask).sum() / mask.sum()", "losses.mean()",
            WEAK + "test_bag_loss_equation",
            "Short bags push the network to answer no.", ""),
    Mistake("your loss takes the likeliest label as certain", "weak.py", "noise_aware_loss",
            "cross_entropy(s, target)", "cross_entropy(s, target.argmax(1))",
            WEAK + "test_noise_aware_loss_equation",
            "It still learns, but what the label model knew about its own doubts is lost.", ""),
    Mistake("your wrong labels are sometimes right", "weak.py", "transition",
            "(1 - right) / (classes - 1)", "torch.ones_like(right) / classes",
            WEAK + "test_transition",
            "With ten classes and a noise rate of 50 %, only 45 % of the labels are wrong.", ""),
    Mistake("you drop images from the first epoch on", "weak.py", "keep_rate",
            "1 - min(epoch / warmup * tau, tau)", "1 - tau",
            WEAK + "test_keep_rate",
            "Losses of an untrained network choose what it learns from.", ""),
    Mistake("you keep the images with the largest losses", "weak.py", "small_loss",
            "largest=False", "largest=True",
            WEAK + "test_coteaching_is_algorithm_1",
            "The share of right labels among those kept falls.", ""),
    Mistake("your networks learn what they chose themselves", "weak.py", "coteaching_losses",
            "losses_f[kept_by_g].mean(), losses_g[kept_by_f].mean()",
            "losses_f[kept_by_f].mean(), losses_g[kept_by_g].mean()",
            WEAK + "test_coteaching_is_algorithm_1",
            "Each confirms its own errors, as one network alone does.", ""),
    Mistake("you divide the loss of the kept images by their number twice", "weak.py",
            "coteaching_losses",
            "losses_f[kept_by_g].mean(), losses_g[kept_by_f].mean()",
            "losses_f[kept_by_g].mean() / len(kept_by_g), losses_g[kept_by_f].mean() / "
            "len(kept_by_f)",
            WEAK + "test_coteaching_is_algorithm_1",
            "The learning rate is in effect divided by the number of kept images.",
            "xingruiyu/coteaching_plus#1"),
    Mistake("your loss is the mean over accepted images only", "weak.py", "fixmatch_loss",
            "torch.where(certainty >= threshold, losses, 0.0).mean()",
            "losses[certainty >= threshold].mean()",
            WEAK + "test_fixmatch_equation",
            "At first a few images have the weight of all; with none, the loss is NaN.", ""),
    Mistake("your pseudo-labels come from the strong view", "weak.py", "fixmatch_loss",
            "weak_logits.detach()", "strong_logits.detach()",
            WEAK + "test_fixmatch_equation",
            "The network is told what it already says.", ""),
    Mistake("your unlabelled images leave out the labelled ones", "weak.py", "pseudo",
            "(index.unsqueeze(1), args", "(index[~torch.isin(index, few)].unsqueeze(1), args",
            WEAK + "test_few_labels",
            "A port did, but the paper's code does not; readers asked about it again and again.",
            "kekmodel/FixMatch-pytorch#10"),
]


# ==================================================================================================
# Putting one in
# ==================================================================================================


def span(source, function):
    """Where "name" or "Class.name", with its decorators, begins and ends in source."""
    node = ast.parse(source)
    for name in function.split("."):
        node = next(n for n in node.body if getattr(n, "name", "") == name)
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    lines = source.splitlines(keepends=True)
    return len("".join(lines[: first - 1])), len("".join(lines[: node.end_lineno]))


def patched(mistake):
    """The source of the mistake's file with the mistake in it."""
    source = (ROOT / mistake.file).read_text()
    start, end = span(source, mistake.function)
    function = source[start:end]
    if function.count(mistake.old) != 1:
        raise ValueError(f"{mistake.old!r} is not exactly once in {mistake.function}")
    return source[:start] + function.replace(mistake.old, mistake.new) + source[end:]


def ours():
    """The modules of this project that are imported, by name."""
    folders = (str(ROOT), str(ROOT / "tests"))
    return {name: module for name, module in sys.modules.items()
            if os.path.dirname(getattr(module, "__file__", None) or "") in folders}


@contextlib.contextmanager
def in_memory(sources):
    """Imports find these {name: source} in place of the files; the others are imported anew."""
    before = ours()
    for name in before:
        del sys.modules[name]
    try:
        for name, source in sources.items():
            module = types.ModuleType(name)
            module.__file__ = str(ROOT / f"{name}.py")
            shown = f"<{name}>"  # here inspect.getsource finds the lines
            linecache.cache[shown] = len(source), None, source.splitlines(keepends=True), shown
            sys.modules[name] = module
            exec(compile(source, shown, "exec"), module.__dict__)
        yield
    finally:
        for name in ours():
            del sys.modules[name]
        sys.modules.update(before)


class Reports:
    """A plugin of pytest that keeps how the tests went: failed, {test: why}, and passed. What was
    skipped is in neither."""

    def __init__(self):
        self.failed, self.passed = {}, []

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed[report.nodeid] = report.longreprtext
        elif report.when == "call" and report.passed:
            self.passed.append(report.nodeid)

    def pytest_collectreport(self, report):
        if report.failed:
            self.failed[report.nodeid] = report.longreprtext


def outcome(sources, tests, *flags):
    """Run tests, up to the first that fails, with these {name: source} in memory -> Reports."""
    argv = ["--rootdir", str(ROOT), *"-q -x --assert=plain --tb=short".split(), *flags]
    for plugin in ("cacheprovider", "faulthandler", "unraisableexception"):  # they take time
        argv += ["-p", f"no:{plugin}"]
    reports = Reports()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        with in_memory(sources):
            code = pytest.main([*argv, *(str(ROOT / test) for test in tests)], [reports])
    if code not in (0, 1, 5) and not reports.failed:  # 5: -k left none
        raise RuntimeError(printed.getvalue())
    return reports


# ==================================================================================================
# lessons/museum.md
# ==================================================================================================

INTRODUCTION = """# The museum of bugs

Ways in which implementations of these methods go wrong: the mistake, what you see, and where it is
on public record, if it is. Each is in `tests/mistakes.py` as a patch of a few lines to the file
here, and `python -m pytest tests/test_museum.py` shows that the named test fails with it.
"""


def source_of(record):
    if record.startswith("arXiv:"):
        return f"[{record}](https://arxiv.org/abs/{record[6:]})"
    repository, _, number = record.partition("#")
    return f"[{record}](https://github.com/{repository}/issues/{number})"


def museum():
    """The text of lessons/museum.md."""
    rooms = {}
    for mistake in MISTAKES:
        rooms.setdefault(mistake.file, []).append(mistake)
    text = INTRODUCTION
    for file, mistakes in rooms.items():
        text += f"\n## {file}\n"
        for m in mistakes:
            record = source_of(m.record) if m.record else "not in the public record we know of"
            text += (f"\n**{m.name[0].upper()}{m.name[1:]}** (`{m.function}`, caught by "
                     f"`{m.test.split('::')[1]}`).\\\n{m.saw}\\\nRecord: {record}.\n")
    return text


if __name__ == "__main__":
    (ROOT / "lessons" / "museum.md").write_text(museum())
