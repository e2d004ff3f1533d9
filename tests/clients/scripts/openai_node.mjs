// OpenAI's client for JavaScript: chat completions with the headers of their replies.

import { createInterface } from "node:readline";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.env.BASE_URL, apiKey: process.env.API_KEY, maxRetries: 0 });
const messages = [];

for await (const question of createInterface({ input: process.stdin })) {
  messages.push({ role: "user", content: question });
  const { data, response } = await client.chat.completions
    .create({ model: "soma", messages, max_tokens: 16, temperature: 0 })
    .withResponse();
  const { message } = data.choices[0];
  messages.push(message);
  const [session, engine] = ["x-soma-session", "x-soma-engine"].map((name) => response.headers.get(name));
  console.log(JSON.stringify({ text: message.content, session, engine }));
}
