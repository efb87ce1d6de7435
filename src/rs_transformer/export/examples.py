"""Sentences with which the web pages begin, by language."""

EXAMPLES = {
    "ja": ["彼は水泳が得意だ。", "猫が好きです。彼女は毎朝七時に起きる。"],
    "en": ["He is good at swimming.", "I like cats. She gets up at seven every morning."],
    "de": ["Er kann gut schwimmen.", "Ich mag Katzen. Sie steht jeden Morgen um sieben auf."],
    "fr": ["Il nage bien.", "J'aime les chats. Elle se lève tous les matins à sept heures."],
    "es": ["Nada muy bien.", "Me gustan los gatos. Ella se levanta a las siete todas las mañanas."],
}
