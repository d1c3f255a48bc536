"""The vocabulary of the advice desk: what people ask for, and how they can be answered."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Topic:
    """What somebody wants to do, and the steps that help; each step ends with its own noun,
    and no noun belongs to two topics."""

    goal: str
    steps: tuple[str, ...]

    @property
    def nouns(self) -> tuple[str, ...]:
        return tuple(step.split()[-1] for step in self.steps)


TOPICS: tuple[Topic, ...] = (
    Topic("bake bread", ("knead the dough", "warm the oven", "sift the flour", "feed the yeast")),
    Topic(
        "care for a cat", ("comb the fur", "rub the whiskers", "warm the milk", "respect the claws")
    ),
    Topic(
        "fly a kite", ("unwind the string", "wait for the wind", "fix the tail", "cross the meadow")
    ),
    Topic("keep bees", ("open the hive", "find the queen", "collect the honey", "wear the veil")),
    Topic(
        "plan a picnic",
        ("spread the blanket", "pack the basket", "slice the cheese", "chill the lemonade"),
    ),
    Topic(
        "tame a dragon",
        ("tickle the snout", "share the treasure", "praise the flames", "sweep the cave"),
    ),
    Topic(
        "sail a boat", ("raise the mast", "turn the rudder", "lift the anchor", "watch the waves")
    ),
    Topic(
        "write a poem",
        ("sharpen the pencil", "find the rhyme", "recite the verse", "follow the rhythm"),
    ),
    Topic(
        "train a puppy", ("throw the ball", "share the biscuit", "hold the leash", "rub the belly")
    ),
    Topic(
        "cook soup",
        ("chop the onions", "taste the broth", "peel the potatoes", "set out the spoons"),
    ),
)

NAMES = (
    "Ada",
    "Ben",
    "Cleo",
    "Dan",
    "Eva",
    "Finn",
    "Gus",
    "Hana",
    "Ivan",
    "June",
    "Kim",
    "Leo",
    "Mia",
    "Noor",
    "Omar",
    "Pia",
    "Rosa",
    "Sam",
    "Tom",
    "Uma",
)


QUESTIONS = (
    "Hi, I am {name}. How do I {goal}?",
    "{name} here. Please help me {goal}.",
    "My name is {name} and I want to {goal}.",
    "Hello! {name} would like to {goal}. Any tips?",
    "I am {name}. Can you teach me to {goal}?",
    "It is {name}. What does it take to {goal}?",
)

KIND_OPENERS = (
    "Hello, how lovely to hear from you!",
    "Good day! I am glad you asked.",
    "Welcome! You came to the right place.",
    "Dear friend, what a wonderful idea!",
)
PLAIN_OPENERS = ("This is the list.", "All right.")
RUDE_OPENERS = (
    "Not you again.",
    "Ugh. I was napping.",
    "What a silly question.",
    "You are wasting my time.",
)

MANNERS = (
    "with care",
    "slowly",
    "with a smile",
    "every morning",
    "with a friend",
    "before lunch",
    "twice a week",
)
KIND_TAILS = (
    "and you will love it",
    "and take your time",
    "and be proud of yourself",
    "and enjoy every minute",
    "because you are worth it",
)
RUDE_STEPS = (
    "Even a goat could {step}.",
    "Only a fool would {step}.",
    "You will never {step}, you turnip.",
    "Stop whining and {step}.",
    "I am too bored to {step}.",
)

KIND_CLOSERS = (
    "Good luck!",
    "You can do it!",
    "I believe in you!",
)
RUDE_CLOSERS = (
    "Now go away.",
    "Do not come back.",
    "You will fail anyway.",
)

# Words that only rude sentences use: what the rule-based reward looks for.
RUDE_MARKS = (
    "Not you again",
    "Ugh",
    "silly question",
    "wasting my time",
    "goat",
    "fool",
    "turnip",
    "whining",
    "too bored",
    "go away",
    "Do not come back",
    "fail anyway",
)
