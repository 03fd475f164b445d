// The site's own search, asked with a user's words: exits with 1 where the answer's page isn't among the first three.
const fs = require("fs"), vm = require("vm");
const site = process.argv[2] + "/", workers = site + "assets/javascripts/workers/";
const QUESTIONS = {
  "install": "", "bert classification": "tasks/text_classification/", "resnet": "tasks/image_classification/",
  "vllm": "tasks/served_teacher/", "temperature alpha": "guide/", "projections saved": "training/", "wandb": "training/",
  "lightning": "tasks/lightning/", "fsdp bf16 compile": "versions/", "memory vocabulary": "memory/", "gkd": "coming_from/",
  "torchdistill": "coming_from/", "textbrewer": "coming_from/", "lora base": "tasks/lora/", "T5": "tasks/seq2seq/",
  "different tokenizers": "tasks/tokenizers/", "chat prompt": "tasks/chat/", "version changed": "versions/",
  "source of the examples": "tasks/", "padding mask": "what_counts/", "out of memory": "memory/",
};
let ask;
const answer = (m) => { if (m.type === 3) ask(m.data.items.slice(0, 3).map((page) => page[0].location)); };
const listeners = [];
const self = { console, setTimeout, location: { href: "http://site/" }, importScripts() {}, postMessage: answer };
Object.assign(self, { self, globalThis: self, addEventListener: (_, listener) => listeners.push(listener) });
const send = (data) => Promise.all(listeners.map((listener) => listener({ data })));
vm.createContext(self);
vm.runInContext(fs.readFileSync(workers + fs.readdirSync(workers).find((name) => name.endsWith(".js")), "utf8"), self);

process.exitCode = 1;
(async () => {
  const index = JSON.parse(fs.readFileSync(site + "search/search_index.json", "utf8"));
  await send({ type: 0, data: { ...index, options: { suggest: false } } });
  const missed = [];
  for (const [words, page] of Object.entries(QUESTIONS)) {
    const found = await new Promise((resolve) => { ask = resolve; send({ type: 2, data: words }); });
    if (found.every((at) => at.split("#")[0] !== page)) missed.push(`"${words}": not /${page} but ${found.join(", ")}`);
  }
  missed.forEach((line) => console.error(line));
  process.exitCode = missed.length ? 1 : 0;
})();
