// The official client for Node: node node_client.mjs URL MODEL, with CLIENTS the folder of node_modules.
import { createRequire } from "node:module";

const OpenAI = createRequire(process.env.CLIENTS + "/")("openai").default;
const [url, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Hello there" }];
const options = { model, max_tokens: 8, seed: 7, objective_weights: { brief: 1 } };

const answer = await client.chat.completions.create({ ...options, messages });
let streamed = "";
for await (const chunk of await client.chat.completions.create({ ...options, messages, stream: true }))
  streamed += chunk.choices[0].delta.content ?? "";
const batch = await client.completions.create({ ...options, prompt: ["Once upon", "The sky is"] });
const one = await client.completions.create({ ...options, prompt: "Once upon" });
let refused = null;
try {
  await client.chat.completions.create({ ...options, messages, objective_weights: { fame: 1 } });
} catch (error) {
  refused = [error.status, error.param];
}
console.log(JSON.stringify({
  chat: answer.choices[0].message.content,
  "chat streamed": streamed,
  "chat tokens": answer.usage.completion_tokens,
  text: one.choices[0].text,
  "text batch": batch.choices.map((choice) => choice.text),
  models: (await client.models.list()).data.map((one) => one.id),
  model: (await client.models.retrieve(model)).id,
  refused,
}));
