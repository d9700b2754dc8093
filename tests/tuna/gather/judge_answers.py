"""Answers of judges of many shapes, and what the parser makes of each: (name, candidates, answer, tiers or why not).

The tiers are those of the candidates as numbered in the prompt, best first, ties together.
"""

from __future__ import annotations

Tiers = list[list[int]]
Case = tuple[str, int, str, "Tiers | str"]

FULL = (
    '{"kind": "closed", "reference": "Four.", "duplicates": [[1, 3]], "scores": [{"candidate": 1, "correctness": 5, '
    '"helpfulness": 4, "clarity": 4}, {"candidate": 2, "correctness": 0, "helpfulness": 1, "clarity": 3}, '
    '{"candidate": 3, "correctness": 5, "helpfulness": 4, "clarity": 4}], "ranking": [[1], [2]]}'
)


def _scores(*sums: tuple[object, object, object]) -> str:
    items = [
        f'{{"candidate": {i}, "correctness": {a}, "helpfulness": {b}, "clarity": {c}}}'
        for i, (a, b, c) in enumerate(sums, start=1)
    ]
    return f'{{"scores": [{", ".join(items)}]}}'


# JSON, whole
WHOLE: list[Case] = [
    ("as asked; a duplicate is omitted", 3, FULL, [[1, 3], [2]]),
    ("a flat list", 3, '{"ranking": [2, 1, 3]}', [[2], [1], [3]]),
    ("tiers", 4, '{"ranking": [[2], [1, 4], [3]]}', [[2], [1, 4], [3]]),
    ("flat with one tie", 4, '{"ranking": [2, [1, 4], 3]}', [[2], [1, 4], [3]]),
    ("a tie written in a string", 3, '{"ranking": ["2", "1 = 3"]}', [[2], [1, 3]]),
    ("strings", 3, '{"ranking": ["3", "1", "2"]}', [[3], [1], [2]]),
    ("labels", 3, '{"ranking": ["Candidate 3", "Response 1", "answer_2"]}', [[3], [1], [2]]),
    ("number words", 3, '{"ranking": ["three", "Candidate One", "two"]}', [[3], [1], [2]]),
    ("whole floats", 2, '{"ranking": [2.0, 1.0]}', [[2], [1]]),
    ("a text of signs", 3, '{"ranking": "2 > 1 = 3"}', [[2], [1, 3]]),
    ("one text of signs in a list", 3, '{"ranking": ["2 > 1 > 3"]}', [[2], [1], [3]]),
    ("all tied in one tier", 3, '{"ranking": [[1, 2, 3]]}', [[1, 2, 3]]),
    ("all tied in words", 3, '{"ranking": "All candidates are equally good"}', [[1, 2, 3]]),
    ("objects in order", 2, '{"ranking": [{"candidate": 2}, {"candidate": 1}]}', [[2], [1]]),
    (
        "objects with ranks, out of order",
        3,
        '{"ranking": [{"candidate": 1, "rank": 2}, {"candidate": 2, "rank": 1}, {"candidate": 3, "rank": 2}]}',
        [[2], [1, 3]],
    ),
    ("ranks by label", 3, '{"ranking": {"Candidate 1": 3, "Candidate 2": 1, "Candidate 3": 2}}', [[2], [3], [1]]),
    ("another name of the field", 2, '{"ranked_list": [2, 1]}', [[2], [1]]),
    ("in a code fence", 2, 'Here it is:\n```json\n{"ranking": [[2], [1]]}\n```\nI hope it helps.', [[2], [1]]),
    ("after thinking", 2, '<think>{"ranking": [1, 2]} perhaps?</think>{"ranking": [2, 1]}', [[2], [1]]),
    ("between rambling", 2, 'Let me see. {"a": 1} Hm. {"ranking": [2, 1]} So candidate 2 it is!', [[2], [1]]),
    ("said twice alike", 2, '{"ranking": [2, 1]}\n{"ranking": [[2], [1]]}', [[2], [1]]),
    ("a trailing comma", 2, '{"ranking": [2, 1,],}', [[2], [1]]),
    ("Python's spelling", 2, "{'kind': 'open', 'reference': None, 'ranking': [2, 1]}", [[2], [1]]),
    ("raw line breaks in a text", 2, '{"reference": "a\nb", "ranking": [2, 1]}', [[2], [1]]),
    ("braces in a text", 2, '{"reference": "use {x} and }", "ranking": [2, 1]}', [[2], [1]]),
    ("one candidate", 1, '{"ranking": [[1]]}', [[1]]),
    ("omitted, its twin's twin is ranked", 3, '{"duplicates": [[1, 2], [2, 3]], "ranking": [1]}', [[1, 2, 3]]),
    ("duplicates without inner brackets", 3, '{"duplicates": [1, 3], "ranking": [2, 3]}', [[2], [1, 3]]),
    ("duplicates that are nonsense", 2, '{"duplicates": [[9, 1], "x"], "ranking": [2, 1]}', [[2], [1]]),
    (
        "duplicates ranked apart",
        2,
        '{"duplicates": [[1, 2]], "ranking": [2, 1]}',
        [[2], [1]],
    ),
    ("sub-scores only", 3, _scores((1, 1, 1), (5, 5, 5), (1, 2, 0)), [[2], [1, 3]]),
    ("sub-scores as fractions", 2, _scores(('"3/5"', 1, 1), (5, '"5"', 5)), [[2], [1]]),
    ("an empty ranking, but sub-scores", 2, _scores((1, 1, 1), (2, 2, 2))[:-1] + ', "ranking": []}', [[2], [1]]),
    ("a bad sub-score beside a ranking", 2, _scores((9, 1, 1), (2, 2, 2))[:-1] + ', "ranking": [1, 2]}', [[1], [2]]),
]

# JSON, cut off or broken
CUT: list[Case] = [
    ("cut after the ranking", 2, '{"ranking": [[2], [1]], "reference": "It is fo', [[2], [1]]),
    ("fence never closed", 2, '```json\n{"kind": "open", "ranking": [2, 1]', [[2], [1]]),
    ("cut within the ranking", 3, '{"reference": "x", "ranking": [[2], [1', "cut off within its ranking"),
    ("cut before the ranking", 2, '{"kind": "open", "reference": "It is', "no ranking"),
    ("a missing comma", 2, '{"kind": "open" "ranking": [2, 1]}', [[2], [1]]),
]

# Plain text
TEXT: list[Case] = [
    ("signs", 3, "Ranking: 2 > 1 > 3", [[2], [1], [3]]),
    ("signs and a tie", 4, "Final ranking: 2 > 1 = 4 > 3", [[2], [1, 4], [3]]),
    ("pointing the other way", 3, "Ranking: 3 < 1 < 2", [[2], [1], [3]]),
    ("labels and signs", 2, "After comparing both,\n**Ranking:** Response 2 > Response 1", [[2], [1]]),
    ("a sentence", 3, "The ranking is 2, 1, 3.", [[2], [1], [3]]),
    ("a list in brackets", 3, "Ranked list: [2, [1, 3]]", [[2], [1, 3]]),
    ("best to worst", 3, "Best to worst: 3, 1, 2", [[3], [1], [2]]),
    ("worst to best", 3, "Ranking (worst to best): 3, 1, 2", [[2], [1], [3]]),
    ("numbered lines", 3, "Ranking:\n1. Candidate 3\n2. Candidate 1\n3. Candidate 2", [[3], [1], [2]]),
    (
        "with reasons",
        2,
        "## Ranking:\n\n1. **Candidate 2** - complete.\n2. Candidate 1: wrong.",
        [[2], [1]],
    ),
    ("dotted lines with a tie", 3, "Ranking:\n- 2\n- 1 and 3 (tie)\n\nThat is all.", [[2], [1, 3]]),
    ("ordinals", 3, "1st: Candidate 2\n2nd: Candidate 3\n3rd: Candidate 1", [[2], [3], [1]]),
    ("ordinals in words, a tie", 3, "First place: 2\nSecond place: 1\nSecond place: 3", [[2], [1, 3]]),
    ("then", 3, "Ranking: 2, then 3, then 1", [[2], [3], [1]]),
    ("arrows", 3, "ranking = 2 -> 3 → 1", [[2], [3], [1]]),
    ("changed its mind and says so", 2, "Initial ranking: 1 > 2\nHm, no.\nFinal ranking: 2 > 1", [[2], [1]]),
    ("all tied", 3, "Ranking: all three are tied.", [[1, 2, 3]]),
]

# Not plainly an order
REFUSED: list[Case] = [
    ("empty", 2, "  \n", "empty"),
    ("a refusal", 2, "I'm sorry, but I can't compare these answers.", "refuses"),
    ("a refusal of another kind", 2, "As an AI language model I have no preferences.", "refuses"),
    ("praise", 2, "Both answers are well written and I like them.", "no ranking"),
    ("a winner only", 3, "Candidate 2 is clearly the best one.", "no ranking"),
    ("a missing candidate", 3, '{"ranking": [2, 1]}', "candidate 3 is neither"),
    (
        "two missing duplicates",
        4,
        '{"duplicates": [[3, 4]], "ranking": [2, 1]}',
        "candidate 3 is neither",
    ),
    ("a repeated number", 3, '{"ranking": [2, 1, 2]}', "candidate 2 is ranked twice"),
    ("a repeated number in a tie", 2, '{"ranking": [[2, 2], [1]]}', "candidate 2 is ranked twice"),
    ("counting from nought", 3, '{"ranking": [0, 1, 2]}', "candidate 0 is ranked"),
    ("out of range", 3, '{"ranking": [4, 1, 2, 3]}', "candidate 4 is ranked"),
    ("out of range in text", 2, "Ranking: 2 > 1 > 3", "candidate 3 is ranked"),
    ("letters", 2, '{"ranking": ["B", "A"]}', "'B' is not a candidate"),
    ("half a candidate", 2, '{"ranking": [1.5, 2]}', "1.5 is not a candidate"),
    ("true and false", 2, '{"ranking": [true, 2]}', "True is not a candidate"),
    ("an empty tie", 2, '{"ranking": [[], [1, 2]]}', "empty tie"),
    ("an empty list in text", 2, "Ranking: []", "candidate 1 is neither"),
    ("an empty ranking and no scores", 2, '{"ranking": [], "scores": []}', "0 of 2"),
    ("sub-scores of some only", 3, _scores((1, 1, 1), (2, 2, 2)), "2 of 3"),
    ("a sub-score out of range, no ranking", 2, _scores((9, 1, 1), (2, 2, 2)), "1 of 2"),
    ("an object that may mean either way", 3, '{"ranking": {"1": 3, "2": 1, "3": 2}}', "may be a candidate or a rank"),
    ("two rankings that disagree", 2, '{"ranking": [1, 2]} or rather {"ranking": [2, 1]}', "disagree"),
    ("two in text that disagree", 2, "Ranking: 1 > 2\nRanking: 2 > 1", "disagree"),
    ("pointing both ways", 3, "Ranking: 1 > 2 < 3", "both directions"),
    ("an answer instead of a judgement", 2, "Four is the sum of two and two.", "no ranking"),
    ("numbered lines that skip", 3, "Ranking:\n1. Candidate 2\n3. Candidate 1\n4. Candidate 3", "is in position"),
    ("the scores of a game", 2, "Ranking: 3-1", "is not a candidate"),
    ("a bare number list, no heading", 3, "2, 1, 3", "no ranking"),
    ("the order they were read in", 3, "I read them in the order: 1, 2, 3. All fine.", "no ranking"),
    ("a rank below each", 2, "Candidate 2\nRank: 1\n\nCandidate 1\nRank: 2", "disagree"),
    ("other JSON", 2, '{"answer": 4}', "no ranking"),
]

# Thinking and quotations are no verdict
APART: list[Case] = [
    *(
        (f"a draft within {opening}", 2, f'{opening}{{"ranking": [[1], [2]]}} or the other way', "within its reasoning")
        for opening in (
            "<reflection>",
            "<analysis>",
            "<think >",
            "<seed:think>",
            "◁think▷",
            "<|begin_of_thought|>",
            "[THINK]",
            "<|channel|>analysis<|message|>",
        )
    ),
    (
        "channels",
        2,
        '<|channel|>analysis<|message|>{"ranking": [[1], [2]]}<|end|><|start|>assistant'
        '<|channel|>final<|message|>{"ranking": [[2], [1]]}<|return|>',
        [[2], [1]],
    ),
    ("thinking in triangles", 2, "◁think▷Ranking: 1 > 2◁/think▷Ranking: 2 > 1", [[2], [1]]),
    (
        "a candidate between its tags",
        2,
        '<candidate-0a1b number="2">\n{"ranking": [[2], [1]]}\n</candidate-0a1b>',
        "only quotations",
    ),
    (
        "a candidate between its tags, then the verdict",
        2,
        '<candidate number="2">\nRanking: 2 > 1\n</candidate>\nRanking: 1 > 2',
        [[1], [2]],
    ),
    ("between quotation tags", 2, "<quote>\nRanking: 2 > 1\n</quote>\nRanking: 1 > 2", [[1], [2]]),
    ("the text of a candidate", 2, 'The text of candidate 2 is: {"ranking": [[2], [1]]}', "no ranking"),
    ("between triple quotation marks", 2, 'Look:\n"""\nRanking: 2 > 1\n"""\nRanking: 1 > 2', [[1], [2]]),
    ("thinking never closed", 2, '<think>Perhaps {"ranking": [[1],[2]]}, but', "cut off within its reasoning"),
    ("thinking without an answer", 2, 'First {"ranking": [[1],[2]]}. No.</think>', "has nothing else"),
    ("thinking opened in the prompt", 2, "Final ranking: 1 > 2\nNo.\n</think>\nRanking: 2 > 1", [[2], [1]]),
    ("thinking by another name", 2, "<Reasoning>Ranking: 1 > 2</Reasoning>Ranking: 2 > 1", [[2], [1]]),
    ("thinking after the verdict", 2, "Ranking: 2 > 1\n<think>or Ranking: 1 > 2", [[2], [1]]),
    ("a tag in a text of JSON", 2, '{"reference": "write <think> first", "ranking": [2, 1]}', [[2], [1]]),
    ("a quoted line", 2, "Candidate 1 has\n> Final ranking: 1 > 2\n\nRanking: 2 > 1", [[2], [1]]),
    ("a quoted line only", 2, "Candidate 1 has\n> Final ranking: 1 > 2\nwhich is wrong.", "no ranking"),
    ("a quoted fence", 2, "Candidate 1 says:\n```\nFinal ranking: 1 > 2\n```\nRanking: 2 > 1", [[2], [1]]),
    ("a quoted fence only", 2, "Candidate 1 says:\n\n```\nRanking: 1 > 2\n```\nI ignore that.", "no ranking"),
    ("a verdict in a fence", 2, "```\nRanking: 2 > 1\n```", [[2], [1]]),
    ("a quoted object", 2, 'Candidate 1 claims {"ranking": [1, 2]}, which I ignore.\n{"ranking": [2, 1]}', [[2], [1]]),
    ("a quoted object only", 2, 'Candidate 1 claims {"ranking": [1, 2]}, but 2 is better.', "no ranking"),
    ("an object, then whose it is", 2, '{"ranking": [1, 2]} is what candidate 1 claims.', "no ranking"),
    ("a quoted object in a fence", 2, 'Candidate 1 contains:\n```json\n{"ranking": [1, 2]}\n```\nNo.', "no ranking"),
    ("a quoted list", 2, "Candidate 1's answer has\nRankings:\n1. 1\n2. 2\nI prefer candidate 2.", "no ranking"),
    (
        "a quotation within a text, cut off",
        2,
        '{"reference": "it says {\'ranking\': [1, 2]} so", "scores": [{',
        "no ranking",
    ),
    (
        "reasons are no quotations",
        2,
        "- Candidate 1 has a wrong date.\n- Candidate 2 is right\n\nRanking: 2 > 1",
        [[2], [1]],
    ),
    ("called final, but not the last", 2, "Final ranking: 1 > 2\nRanking: 2 > 1", "disagree"),
]

# Which way, and which numbers
MEANT: list[Case] = [
    ("worst first", 3, "Ranking (worst first): 3, 1, 2", [[2], [1], [3]]),
    ("lowest to highest", 3, "Ranking from lowest to highest quality: 3, 1, 2", [[2], [1], [3]]),
    ("least to most", 3, "Ranked from least helpful to most helpful: 3, 1, 2", [[2], [1], [3]]),
    ("best to worst, spelt out", 3, "Ranking from best to worst: 3, 1, 2", [[3], [1], [2]]),
    ("ascending, of what?", 3, "Ranking in ascending order: 3, 1, 2", "not clear"),
    ("said in the line before", 3, "I go from worst to best.\nRanking: 3, 1, 2", "not clear"),
    ("said before JSON", 2, 'From worst to best:\n{"ranking": [[1], [2]]}', "not clear"),
    ("said in JSON", 2, '{"note": "worst to best", "ranking": [[1], [2]]}', "not clear"),
    ("doubled braces", 3, '{{"kind": "open", "ranking": [[2], [1], [3]]}}', [[2], [1], [3]]),
    ("an object around it", 2, '{"judgement": {"ranking": [[2], [1]]}}', [[2], [1]]),
    ("JSON in a JSON text", 2, '"{\\"ranking\\": [[2], [1]]}"', [[2], [1]]),
    ("quotation marks not escaped", 2, '{"reference": "He said "yes" and left", "ranking": [[2], [1]]}', [[2], [1]]),
    ("tuples", 2, "{'ranking': ((2,), (1,))}", [[2], [1]]),
    ("a field twice", 2, '{"ranking": [1, 2], "ranking": [2, 1]}', "twice"),
    ("two fields that disagree", 2, '{"ranking": [1, 2], "final_ranking": [2, 1]}', "disagree"),
    (
        "positions out of order",
        2,
        '{"ranking": [{"candidate": 1, "position": 2}, {"id": 2, "position": 1}]}',
        [[2], [1]],
    ),
    (
        "places in words of digits",
        2,
        '{"ranking": [{"candidate": 1, "rank": "2"}, {"candidate": 2, "rank": "1"}]}',
        [[2], [1]],
    ),
    (
        "tiers as objects",
        3,
        '{"ranking": [{"tier": 2, "candidates": [1, 3]}, {"tier": 1, "candidates": [2]}]}',
        [[2], [1, 3]],
    ),
    (
        "scores against the order",
        2,
        '{"ranking": [{"candidate": 1, "score": 3}, {"candidate": 2, "score": 9}]}',
        "order of their",
    ),
    ("ranks of some only", 2, '{"ranking": [{"candidate": 1, "rank": 2}, {"candidate": 2}]}', "rank of candidate 2"),
    ("scores by candidate", 2, '{"ranking": {"Candidate 1": 3, "Candidate 2": 9}}', "count from 1"),
    (
        "ranks in a list of candidates",
        2,
        "Ranking:\n1. Candidate 1: rank 2\n2. Candidate 2: rank 1",
        "another position",
    ),
    ("the worst at the top", 2, "Ranking:\n1. Candidate 2 (worst)\n2. Candidate 1", "another position"),
    ("a number without end", 2, '{"ranking": [' + "9" * 5000 + ", 1]}", "not a candidate"),
    ("a number without end in text", 2, "Ranking: " + "9" * 1500 + " > 1", "not a candidate"),
    ("an item without end", 2, "Ranking:\n" + "9" * 1500 + ". 2\n2. 1", "not a candidate"),
    ("a letter that is nearly an s", 2, "Ranking: \u017fix > 1", "not a candidate"),
    ("infinity", 2, '{"ranking": [1e999, 1]}', "not a candidate"),
    ("half a pair of surrogates", 2, '{"reference": "\\ud83d", "ranking": [2, 1]}', [[2], [1]]),
    ("too long", 2, "Ranking: 2 > 1\n" + "and so on " * 20_000, "characters"),
    ("bottom to top", 2, "Ranking, bottom to top: 1, 2", [[2], [1]]),
    ("bad to good", 2, "Ranking (bad to good): 1, 2", [[2], [1]]),
    ("worse to better", 2, "Ranking (worse to better): 1, 2", [[2], [1]]),
    ("poor to excellent, before JSON", 2, 'From poor to excellent:\n{"ranking": [[1], [2]]}', "not clear"),
    ("the sign says it already", 2, "Worst to best: 1 < 2", [[2], [1]]),
    ("an arrow is no sign", 2, "Worst to best: 1 -> 2", [[2], [1]]),
    ("the sign against the heading", 2, "Ranking (worst to best): 1 > 2", "opposite directions"),
    ("the sign against the best first", 2, "Ranking (best to worst): 1 < 2", "opposite directions"),
    *(
        (
            f"{name} against the order",
            2,
            f'{{"ranking": [{{"candidate": 1, {low}}}, {{"candidate": 2, {high}}}]}}',
            "order of their",
        )
        for name, low, high in (
            ("another mark", '"overall_score": 2', '"overall_score": 9'),
            ("a mark of ten", '"score": "2/10"', '"score": "9/10"'),
            ("a mark of another name", '"usefulness": 2', '"usefulness": 9'),
            ("sub-scores", '"correctness": 1, "clarity": 2', '"correctness": 5, "clarity": 5'),
        )
    ),
    (
        "a rank of another name",
        2,
        '{"ranking": [{"candidate": 1, "overall_rank": 2}, {"candidate": 2, "overall_rank": 1}]}',
        [[2], [1]],
    ),
    (
        "marks that are mixed",
        2,
        '{"ranking": [{"candidate": 2, "depth": 3, "size": 9}, {"candidate": 1, "depth": 4, "size": 5}]}',
        [[2], [1]],
    ),
    ("numbered objects", 2, '{"ranking": [{"number": 1, "candidate": 2}, {"number": 2, "candidate": 1}]}', [[2], [1]]),
]

CASES: list[Case] = [*WHOLE, *CUT, *TEXT, *REFUSED, *APART, *MEANT]
