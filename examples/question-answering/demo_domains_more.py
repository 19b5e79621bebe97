"""The other five domains of the demo data, and the sentences that fit anywhere."""

from __future__ import annotations

import demo_values as v
from demo_domains import BATTLES, COMPANIES, PEOPLE, RECIPES, RIVERS, Domain

STATIONS = Domain(
    name="Research stations",
    subject=v.place_with("Station"),
    slots={
        "opened": v.date(1948, 2015),
        "topic": v.one_of(v.WORDS["topics"]),
        "crew": v.amount(6, 140, "people"),
        "leader": v.full_name,
    },
    statements=(
        "{name} opened on {opened}.",
        "On {opened} the first flag was raised at {name}.",
        "Scientists at {name} study {topic}.",
        "{name} was built to study {topic}.",
        "{name} is home to {crew} in summer.",
        "Up to {crew} can sleep at {short}.",
        "{leader} is in charge of {name}.",
        "The leader of {name} is {leader}.",
    ),
    unseen_statements=(
        "Work at {name} began on {opened}.",
        "Most papers from {name} are about {topic}.",
        "{name} is run by {leader}.",
    ),
    questions={
        "opened": (
            "When did {name} open?",
            "On what date was {name} opened?",
            "On which day did {name} start work?",
        ),
        "topic": (
            "What do scientists study at {name}?",
            "What is studied at {name}?",
            "What is the research topic of {name}?",
        ),
        "crew": (
            "How many people live at {name}?",
            "How many people can {name} house?",
            "How large is the crew of {name}?",
        ),
        "leader": (
            "Who leads {name}?",
            "Who is in charge of {name}?",
            "Who is the head of {name}?",
        ),
    },
    asides=(
        "Supplies reach {short} twice a year.",
        "The kitchen of {name} never closes.",
        "A radio mast stands next to {name}.",
    ),
)

SHIPS = Domain(
    name="Ships",
    subject=v.vessel,
    slots={
        "launched": v.year(1790, 1960),
        "captain": v.full_name,
        "cargo": v.one_of(v.WORDS["cargoes"]),
        "port": v.one_of(v.WORDS["cities"]),
        "weight": v.amount(300, 42000, "tons", 50),
    },
    statements=(
        "The {name} was launched in {launched} in {port}.",
        "In {launched} the {name} left the shipyard.",
        "Captain {captain} commanded the {name}.",
        "The {name} sailed under Captain {captain} on its last voyage.",
        "The {name} carried {cargo}.",
        "Loaded with {cargo}, the {name} crossed the ocean many times.",
        "Workers in {port} built the {name} out of local wood.",
        "The {name} weighed {weight}.",
        "At {weight}, the {name} was too heavy for small harbors.",
    ),
    unseen_statements=(
        "The {name} has been at sea since {launched}.",
        "The master of the {name} was {captain}.",
        "Barrels and boxes of {cargo} filled the {name}.",
    ),
    questions={
        "launched": (
            "When was the {name} launched?",
            "In which year was the {name} launched?",
            "In what year did the {name} first go to sea?",
        ),
        "captain": (
            "Who commanded the {name}?",
            "Who was the captain of the {name}?",
            "Under whom did the {name} sail?",
        ),
        "cargo": (
            "What did the {name} carry?",
            "What was the cargo of the {name}?",
            "What was the {name} loaded with?",
        ),
        "port": (
            "Where was the {name} built?",
            "In which city was the {name} built?",
            "Which city did the {name} come from?",
        ),
        "weight": (
            "How much did the {name} weigh?",
            "What was the weight of the {name}?",
            "How heavy was the {name}?",
        ),
    },
    asides=(
        "The bell of the {name} hangs in a museum.",
        "Model builders still copy the {short}.",
        "A storm nearly sank the {name}.",
    ),
)

BRIDGES = Domain(
    name="Bridges",
    subject=v.place_with("Bridge"),
    slots={
        "finished": v.year(1760, 2010),
        "designer": v.full_name,
        "material": v.one_of(v.WORDS["materials"]),
        "span": v.amount(35, 1900, "metres"),
        "cost": v.millions,
    },
    statements=(
        "{name} was finished in {finished} after long delays.",
        "Traffic has used {name} since {finished}.",
        "{name} was designed by {designer}.",
        "{designer} drew the plans for {name}.",
        "{name} is built of {material}.",
        "The arches of {name} are made of {material}.",
        "{name} spans {span}.",
        "With a span of {span}, {name} is among the longest in the area.",
        "The city paid {cost} for {name}.",
        "{name} cost {cost}.",
    ),
    unseen_statements=(
        "{finished} saw the completion of {name}.",
        "The architect behind {name} was {designer}.",
        "{cost} were spent on {name}.",
    ),
    questions={
        "finished": (
            "When was {name} finished?",
            "In which year was {name} finished?",
            "In what year was {name} completed?",
        ),
        "designer": (
            "Who designed {name}?",
            "Who drew the plans for {name}?",
            "Who was the architect of {name}?",
        ),
        "material": (
            "What is {name} made of?",
            "Which material is {name} built of?",
            "What was used to build {name}?",
        ),
        "span": (
            "How long is {name}?",
            "What is the span of {name}?",
            "How many metres does {name} span?",
        ),
        "cost": (
            "How much did {name} cost?",
            "What did the city pay for {name}?",
            "What was the price of {name}?",
        ),
    },
    asides=(
        "At night {name} is lit by lamps.",
        "Cyclists complain about the wind on {short}.",
        "{name} appears on an old banknote.",
    ),
)

SCHOOLS = Domain(
    name="Schools",
    subject=v.place_with("College"),
    slots={
        "city": v.one_of(v.WORDS["cities"]),
        "students": v.amount(180, 19000, "students", 10),
        "head": v.full_name,
        "opened": v.year(1700, 1998),
    },
    statements=(
        "{name} is a school in {city}.",
        "{name} stands in the old town of {city}.",
        "{students} attend {name}.",
        "There are {students} at {name} this year.",
        "The head of {name} is {head}.",
        "{head} has led {name} for ten years.",
        "{name} opened its doors in {opened}.",
        "The first class at {name} was taught in {opened}.",
    ),
    unseen_statements=(
        "Visitors to {city} can tour {name}.",
        "This year {name} teaches {students}.",
        "{name} dates back to {opened}.",
    ),
    questions={
        "city": ("Where is {name}?", "In which city is {name}?", "What city is {name} located in?"),
        "students": (
            "How many students attend {name}?",
            "How many students are at {name}?",
            "How many students does {name} teach?",
        ),
        "head": ("Who leads {name}?", "Who is the head of {name}?", "Who runs {name}?"),
        "opened": (
            "When did {name} open?",
            "In which year did {name} open?",
            "How far back does {name} date?",
        ),
    },
    asides=(
        "The library of {name} is open to all.",
        "Graduates of {short} meet every autumn.",
        "The rowing team of {name} rarely loses.",
    ),
)

FESTIVALS = Domain(
    name="Festivals",
    subject=v.place_with("Festival"),
    slots={
        "month": v.one_of(v.WORDS["months"]),
        "city": v.one_of(v.WORDS["cities"]),
        "visitors": v.amount(2000, 90000, "visitors", 500),
        "organiser": v.full_name,
        "ticket": v.amount(8, 120, "euros"),
    },
    statements=(
        "The {name} takes place in {city}.",
        "Every {month} the {name} fills the streets of {city}.",
        "The {name} is held in {month}.",
        "The {name} attracts {visitors}.",
        "Last time {visitors} came to the {name}.",
        "The {name} is organised by {organiser}.",
        "{organiser} had the idea for the {name}.",
        "A ticket for the {name} costs {ticket}.",
        "For {ticket} one can visit the {name}.",
    ),
    unseen_statements=(
        "{month} is the month of the {name}.",
        "{city} has hosted the {name} for decades.",
        "The person behind the {name} is {organiser}.",
    ),
    questions={
        "month": (
            "When is the {name} held?",
            "In which month is the {name}?",
            "During which month does the {name} take place?",
        ),
        "city": (
            "Where does the {name} take place?",
            "In which city is the {name}?",
            "Which city hosts the {name}?",
        ),
        "visitors": (
            "How many visitors does the {name} attract?",
            "How many visitors came to the {name}?",
            "How many visitors go to the {name}?",
        ),
        "organiser": (
            "Who organises the {name}?",
            "Who had the idea for the {name}?",
            "Who is behind the {name}?",
        ),
        "ticket": (
            "How much is a ticket for the {name}?",
            "What does a ticket for the {name} cost?",
            "What is the price of the {name}?",
        ),
    },
    asides=(
        "Fireworks end the {name}.",
        "Local bakers prepare for the {short} weeks ahead.",
        "The {name} has its own song.",
    ),
)

DOMAINS = (
    PEOPLE, COMPANIES, RIVERS, BATTLES, RECIPES, STATIONS, SHIPS, BRIDGES, SCHOOLS, FESTIVALS,
)  # fmt: skip

# Distractors with names, numbers and dates of their own, about nothing that is asked.
FILLERS = (
    "The weather in {city} had been dry for {weeks}.",
    "A newspaper from {year} tells a different story.",
    "Opinions on this differ.",
    "{person} wrote a short guide about the area.",
    "Much of this was recorded on {date}.",
    "Tourists from {country} arrive by bus.",
    "A local club has {members}.",
    "Entry to the archive in {city} costs {price}.",
)
FILLER_SLOTS = {
    "city": v.one_of(v.WORDS["cities"]),
    "country": v.one_of(v.WORDS["countries"]),
    "date": v.date(1850, 2010),
    "members": v.amount(20, 900, "members"),
    "person": v.full_name,
    "price": v.amount(2, 30, "euros"),
    "weeks": v.amount(3, 9, "weeks"),
    "year": v.year(1820, 2005),
}
