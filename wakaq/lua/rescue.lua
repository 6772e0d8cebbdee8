-- Moves payloads of a dead supervisor from one of its lanes to the front of their queue, the first one foremost.
-- KEYS[1]  lane (list)    KEYS[2]  queue (list)    KEYS[3]  stats (hash)
-- ARGV     payload, new, …    pairs; `new` is the same payload, or counts one redelivery more
-- Returns how many were moved; what another rescuer was faster with is not moved again.
local lane, queue, stats = KEYS[1], KEYS[2], KEYS[3]
local moved, redelivered = 0, 0
for i = #ARGV - 1, 1, -2 do
  if redis.call('LREM', lane, -1, ARGV[i]) == 1 then
    redis.call('LPUSH', queue, ARGV[i + 1])
    moved = moved + 1
    if ARGV[i] ~= ARGV[i + 1] then redelivered = redelivered + 1 end
  end
end
if redelivered > 0 then redis.call('HINCRBY', stats, 'redelivered', redelivered) end
return moved
