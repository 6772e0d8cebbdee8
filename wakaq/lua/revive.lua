-- Puts a dead letter's payload back at the end of its queue.
-- KEYS[1]  dead letters (list)    KEYS[2]  queue (list)
-- ARGV[1]  the letter    ARGV[2]  its payload, as new
-- Returns 1, or 0 if the letter is gone.
local kind = redis.call('TYPE', KEYS[2]).ok
if kind ~= 'list' and kind ~= 'none' then
  return redis.error_reply('WRONGTYPE ' .. KEYS[2] .. ' is a ' .. kind .. ', not a list')
end
if redis.call('LREM', KEYS[1], -1, ARGV[1]) == 0 then return 0 end
redis.call('RPUSH', KEYS[2], ARGV[2])
return 1
