"""LLaVA-1.5-7B at the published schedules of all methods, at equal true budgets, and a control; see table.py."""

from table import LLAVA_TASKS, Row, Table, at_true_budgets, of_other_papers, run

TABLE = Table(
    title="LLaVA-1.5-7B, 576 vision tokens, published schedules and true budgets",
    model="llava-hf/llava-1.5-7b-hf",
    tasks=LLAVA_TASKS,
    rows=(
        Row("vanilla", true_average=576),
        Row("paper 128", "preset=llava-1.5-7b/128", true_average=146.2),
        Row("paper 64", "preset=llava-1.5-7b/64", published="93.1", true_average=82.9),
        Row("paper 48", "preset=llava-1.5-7b/48", true_average=66.7),
        Row("paper 32", "preset=llava-1.5-7b/32", true_average=51.0),
        *of_other_papers(),
        *at_true_budgets(192, 128, 64, 32),
    ),
)

if __name__ == "__main__":
    run(TABLE)
