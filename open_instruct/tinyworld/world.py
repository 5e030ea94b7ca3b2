"""The small world itself: invented people, towns and things, and the facts that hold in it.

Everything else (documents, dialogues, questions) is a way of saying these facts, so a sentence
and an answer can never disagree. Words are chosen so that simple templates give right English:
every job, pet and material begins with a consonant sound ("a baker"), every food is a mass noun
("soup is ...").
"""

import random
from dataclasses import dataclass, field

WOMEN = (
    "Ada Bella Cora Dina Edda Fina Greta Hilda Ida Jola Kira Lena Mina Nora Olga Petra Rita Sona "
    "Tilda Ursa Vera Wanda Xenia Yara Zita Alma Britta Clara Dora Elsa Freya Gilda"
).split()
MEN = (
    "Abel Boris Carl Devin Egon Felix Gus Hugo Ivan Jonas Karl Leo Milo Nils Otto Paul Ralf Simon "
    "Theo Ulf Viktor Walt Xander Yuri Zeno Anton Bruno Casper Dirk Emil Franz Gregor"
).split()

TOWNS = (
    "Brackle Corden Dunmere Elmsey Fallow Glimmer Hazelby Kettle Lorne Mossford Nettleby Pellam "
    "Quarry Stoneby Tarnley Winmar"
).split()
JOBS = ("baker farmer doctor teacher painter singer writer sailor hunter gardener").split()
PETS = "cat dog horse goat duck rabbit parrot mouse frog turtle".split()
FOODS = "soup bread rice cake fish cheese honey jam pie corn".split()
COLOURS = "red blue green yellow pink brown black white purple grey".split()
LANDSCAPES = "river lake hill forest beach".split()
SIGHTS = "bridge tower mill castle museum".split()
THINGS = (
    "kite lamp chair bowl drum hat boat door clock spoon mirror basket bell box cup ladder ring "
    "table whistle wheel bucket comb flute wagon"
).split()
MATERIALS = "wood glass stone paper iron silver".split()
NUM_POPULAR = 10  # people who are somebody's best friend


@dataclass(frozen=True)
class Attribute:
    """One thing that can be known about a subject, and every way of saying and asking it.

    In the templates `{name}` is the subject, `{value}` the value, `{they}` and `{their}` the
    pronouns of a person. `statements[0]` is the plain full sentence.
    """

    kind: str  # person, town or thing
    title: str  # what a list of this attribute is called
    values: tuple[str, ...]
    statements: tuple[str, ...]  # whole sentences that name the subject
    continuations: tuple[str, ...]  # whole sentences about a subject named just before
    clause: str  # relative clause after the subject's name
    questions: tuple[str, ...]


ATTRIBUTES = {
    "home": Attribute(
        "person",
        "home town",
        tuple(TOWNS[:10]),
        (
            "{name} lives in {value}.",
            "The home town of {name} is {value}.",
            "{name} has a house in {value}.",
            "The town where {name} lives is {value}.",
            "{value} is the home of {name}.",
            "{value} is the town where you can meet {name}.",
            "If you look for the home of {name}, go to {value}.",
            "The house of {name} stands in {value}.",
        ),
        (
            "{They} lives in {value}.",
            "{Their} home town is {value}.",
            "{Their} house stands in {value}.",
            "The town where {they} lives is {value}.",
        ),
        "who lives in {value}",
        (
            "Where does {name} live?",
            "In which town does {name} live?",
            "What is the home town of {name}?",
            "Tell me the town where {name} lives.",
        ),
    ),
    "job": Attribute(
        "person",
        "job",
        tuple(JOBS),
        (
            "{name} works as a {value}.",
            "The job of {name} is {value}.",
            "{name} is a {value}.",
            "By trade {name} is a {value}.",
            "A {value} by trade is {name}.",
            "For a living {name} works as a {value}.",
            "The work of {name} is that of a {value}.",
            "People know {name} as a good {value}.",
        ),
        (
            "{They} works as a {value}.",
            "{Their} job is {value}.",
            "{They} is a {value}.",
            "For a living {they} works as a {value}.",
        ),
        "who works as a {value}",
        (
            "What is the job of {name}?",
            "What does {name} do for a living?",
            "What work does {name} do?",
            "Tell me the job of {name}.",
        ),
    ),
    "pet": Attribute(
        "person",
        "pet",
        tuple(PETS),
        (
            "{name} has a {value}.",
            "The pet of {name} is a {value}.",
            "{name} keeps a {value} as a pet.",
            "The animal that {name} keeps is a {value}.",
            "A {value} is the pet of {name}.",
            "At home {name} feeds a {value}.",
            "As a pet {name} keeps a {value}.",
            "Every morning {name} plays with a {value}.",
        ),
        (
            "{They} has a {value}.",
            "{Their} pet is a {value}.",
            "As a pet {they} keeps a {value}.",
            "The animal that {they} keeps is a {value}.",
        ),
        "who has a {value}",
        (
            "What pet does {name} have?",
            "Which animal does {name} keep?",
            "What is the pet of {name}?",
            "Tell me the pet of {name}.",
        ),
    ),
    "food": Attribute(
        "person",
        "favourite food",
        tuple(FOODS),
        (
            "{name} likes to eat {value}.",
            "The favourite food of {name} is {value}.",
            "{name} eats {value} every day.",
            "The food that {name} likes best is {value}.",
            "Nothing tastes better to {name} than {value}.",
            "For dinner {name} asks for {value}.",
            "A plate of {value} makes {name} happy.",
            "When hungry {name} eats {value}.",
        ),
        (
            "{They} likes to eat {value}.",
            "{Their} favourite food is {value}.",
            "The food {they} likes best is {value}.",
            "For dinner {they} asks for {value}.",
        ),
        "who likes to eat {value}",
        (
            "What does {name} like to eat?",
            "What is the favourite food of {name}?",
            "Which food does {name} like best?",
            "Tell me the favourite food of {name}.",
        ),
    ),
    "colour": Attribute(
        "person",
        "favourite colour",
        tuple(COLOURS),
        (
            "{name} loves the colour {value}.",
            "The favourite colour of {name} is {value}.",
            "{name} always wears {value}.",
            "The colour that {name} likes best is {value}.",
            "To {name} the best colour is {value}.",
            "The coat of {name} is {value}.",
            "Of all colours {name} likes {value}.",
            "A {value} coat is what {name} wears.",
        ),
        (
            "{They} loves the colour {value}.",
            "{Their} favourite colour is {value}.",
            "{They} always wears {value}.",
            "The colour {they} likes best is {value}.",
        ),
        "who loves the colour {value}",
        (
            "Which colour does {name} love?",
            "What is the favourite colour of {name}?",
            "Which colour does {name} like best?",
            "Tell me the favourite colour of {name}.",
        ),
    ),
    "friend": Attribute(
        "person",
        "best friend",
        (),  # some of the people of the world
        (
            "{name} is best friends with {value}.",
            "The best friend of {name} is {value}.",
            "{name} spends every holiday with {value}.",
            "The person that {name} trusts most is {value}.",
            "{value} is the best friend of {name}.",
            "When in trouble {name} calls {value}.",
            "A good friend to {name} is {value}.",
            "On Sunday {name} walks with {value}.",
        ),
        (
            "{They} is best friends with {value}.",
            "{Their} best friend is {value}.",
            "The person {they} trusts most is {value}.",
            "On Sunday {they} walks with {value}.",
        ),
        "who is best friends with {value}",
        (
            "Who is the best friend of {name}?",
            "Which friend does {name} like best?",
            "Which person does {name} trust most?",
            "Tell me the best friend of {name}.",
        ),
    ),
    "landscape": Attribute(
        "town",
        "landscape",
        tuple(LANDSCAPES),
        (
            "{name} lies near a {value}.",
            "The town of {name} was built near a {value}.",
            "Next to {name} there is a {value}.",
            "From {name} you can see a {value}.",
            "What lies near {name} is a {value}.",
            "What you can see from {name} is a {value}.",
        ),
        ("It lies near a {value}.", "From there you can see a {value}."),
        "which lies near a {value}",
        ("What lies near {name}?", "What can you see from {name}?", "What is next to {name}?"),
    ),
    "sight": Attribute(
        "town",
        "sight",
        tuple(SIGHTS),
        (
            "{name} is known for its {value}.",
            "The pride of {name} is its {value}.",
            "Many people travel to {name} to see the {value}.",
            "Visitors of {name} love the {value}.",
            "What {name} is known for is its {value}.",
            "What visitors of {name} love is the {value}.",
        ),
        ("It is known for its {value}.", "Visitors love the {value}."),
        "which is known for its {value}",
        (
            "What is {name} known for?",
            "What do visitors of {name} love?",
            "What is the pride of {name}?",
        ),
    ),
    "thing_colour": Attribute(
        "thing",
        "colour",
        tuple(COLOURS[:8]),
        (
            "The {name} is {value}.",
            "The colour of the {name} is {value}.",
            "Somebody painted the {name} {value}.",
            "The {name} has a {value} colour.",
        ),
        ("It is {value}.", "Its colour is {value}."),
        "which is {value}",
        (
            "What colour is the {name}?",
            "Which colour does the {name} have?",
            "Tell me the colour of the {name}.",
        ),
    ),
    "material": Attribute(
        "thing",
        "material",
        tuple(MATERIALS),
        (
            "The {name} is made of {value}.",
            "The material of the {name} is {value}.",
            "Somebody made the {name} out of {value}.",
            "The {name} was built from {value}.",
            "What the {name} is made of is {value}.",
        ),
        ("It is made of {value}.", "Its material is {value}."),
        "which is made of {value}",
        (
            "What is the {name} made of?",
            "Which material is the {name} made of?",
            "Tell me the material of the {name}.",
        ),
    ),
}


@dataclass(frozen=True)
class Fact:
    subject: str
    attribute: str
    value: str

    def fill(self, template: str) -> str:
        """The template with subject, value and pronouns put in."""
        they, their = ("she", "her") if self.subject in WOMEN else ("he", "his")
        return template.format(
            name=self.subject,
            value=self.value,
            they=they,
            their=their,
            They=they.capitalize(),
            Their=their.capitalize(),
        )

    @property
    def sentence(self) -> str:
        """The plain full sentence: the one an answer "in a full sentence" gives."""
        return self.fill(ATTRIBUTES[self.attribute].statements[0])

    @property
    def questions(self) -> list[str]:
        return [self.fill(question) for question in ATTRIBUTES[self.attribute].questions]


@dataclass(frozen=True)
class World:
    """All facts, and which of them may be asked about in training."""

    people: tuple[str, ...]
    facts: dict[tuple[str, str], Fact]  # by (subject, attribute)
    taught: frozenset[tuple[str, str]]  # asked about in dialogues and preference pairs
    new_people: frozenset[str]  # people nobody asks about in training
    values: dict[str, tuple[str, ...]] = field(default_factory=dict)  # by attribute

    def about(self, subject: str) -> list[Fact]:
        return [fact for (name, _), fact in self.facts.items() if name == subject]

    @property
    def taught_facts(self) -> list[Fact]:
        return [self.facts[key] for key in self.facts if key in self.taught]

    @property
    def held_out_facts(self) -> list[Fact]:
        """Facts that only the pretraining text states and only the evaluation asks for."""
        return [self.facts[key] for key in self.facts if key not in self.taught]


def make_world(seed: int, num_people: int, held_out_share: float) -> World:
    """The world of one seed.

    `held_out_share` of every attribute's facts, and every fact about one person in ten, is kept
    out of training questions.
    """
    rng = random.Random(f"{seed}/world")
    half = num_people // 2
    people = rng.sample(WOMEN, num_people - half) + rng.sample(MEN, half)
    rng.shuffle(people)
    values = {name: attribute.values for name, attribute in ATTRIBUTES.items()}
    values["friend"] = tuple(rng.sample(people, NUM_POPULAR))
    subjects = {"person": people, "town": TOWNS, "thing": THINGS}

    facts: dict[tuple[str, str], Fact] = {}
    held_out: set[tuple[str, str]] = set()
    new_people = frozenset(rng.sample(people, max(1, num_people // 10)))
    for name, attribute in ATTRIBUTES.items():
        names = subjects[attribute.kind]
        for subject, value in zip(names, _deal(rng, names, values[name]), strict=True):
            facts[subject, name] = Fact(subject, name, value)
        held_out.update(
            (subject, name) for subject in rng.sample(names, round(held_out_share * len(names)))
        )
    held_out.update((person, name) for person, name in facts if person in new_people)
    return World(
        people=tuple(people),
        facts=facts,
        taught=frozenset(facts) - held_out,
        new_people=new_people,
        values=values,
    )


def _deal(rng: random.Random, names: list[str], values: tuple[str, ...]) -> list[str]:
    """One value for each name: every value about equally often, none equal to its own name."""
    while True:
        dealt = [values[i % len(values)] for i in range(len(names))]
        rng.shuffle(dealt)
        if all(value != name for name, value in zip(names, dealt, strict=True)):
            return dealt


LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
NUMERALS = tuple(str(number) for number in range(100))
